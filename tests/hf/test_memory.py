"""Freed memory stays with a process that computes."""

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import torch
from reft_ray.hf.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def use():
    return [torch.ones(1 << 20) for _ in range(20)]

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    run = subprocess.run([sys.executable, "-c", _FAULTS, mode], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's habit")
def test_memory_that_was_freed_is_not_faulted_in_again() -> None:
    given_back = faults("give back")
    if given_back < 10_000:
        pytest.skip("this C library keeps freed memory by itself")
    assert faults("keep") < given_back / 3
