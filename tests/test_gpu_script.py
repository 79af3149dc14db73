"""`benchmarks/gpu.py` runs where only torch, transformers and peft are installed, as on a bare GPU machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABSENT = ("ray", "fastapi", "typer", "sqlalchemy", "pydantic", "uvicorn", "orjson", "datasketch", "gguf")
RUN = f"""
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["gpu.py", *sys.argv[1:]]
sys.path.insert(0, "benchmarks")
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_it_needs_torch_transformers_and_peft_alone() -> None:
    found = run("--help")
    assert found.returncode == 0, found.stderr
    assert "--minutes" in found.stdout


@pytest.mark.slow
def test_the_smoke_run_measures_every_section(tmp_path: Path) -> None:
    found = run("--smoke", "--out", str(tmp_path / "gpu.json"))
    assert found.returncode == 0, found.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["skipped"] == {}, found.stdout
    errors = written["gradients against float32"]
    assert max(value for name, value in errors.items() if name.startswith("float32")) < 1e-4
    assert max(value for name, value in errors.items() if name.startswith("bf16")) < 0.1
    assert {"tiny sft", "tiny guided cached 1:4", "tiny guided live 1:1", "tiny filter"} <= written.keys()
