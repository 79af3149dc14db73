"""The base of these tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama(shallow_llama: Path) -> Path:
    """Two layers: these tests train."""
    return shallow_llama
