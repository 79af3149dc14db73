"""Device and number format, freed memory, and parallel forward passes."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from reft_ray.core.errors import UsageError
from reft_ray.hf.compute import ParallelPasses, parallel_passes_if_faster, resolve_dtype

_FAULTS = """
import resource, sys
import torch
from reft_ray.hf.compute import keep_freed_memory

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


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="precision fp16: one of auto, float32, bfloat16"):
        resolve_dtype("fp16", "cpu")


def faults(mode: str) -> int:
    run = subprocess.run([sys.executable, "-c", _FAULTS, mode], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_not_faulted_in_again() -> None:
    default = faults("default")
    if default < 10_000:
        pytest.skip("this C library keeps freed memory by default")
    assert faults("keep") < default / 3


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def sleeping(seconds: dict[int, float]):
    """A pass whose time depends on the number of threads."""
    return lambda: time.sleep(seconds[torch.get_num_threads()])


def test_passes_run_in_parallel_if_more_threads_do_not_make_one_faster(two_threads: None) -> None:
    passes = parallel_passes_if_faster(sleeping({1: 0.004, 2: 0.004}))
    assert passes is not None
    assert passes.count == 2
    assert parallel_passes_if_faster(sleeping({1: 0.02, 2: 0.004})) is None
    torch.set_num_threads(1)
    assert parallel_passes_if_faster(sleeping({})) is None


def test_parallel_passes_use_one_thread_each_and_leave_other_threads_alone(two_threads: None) -> None:
    passes, barrier = ParallelPasses(2), threading.Barrier(2, timeout=10)

    def run(item: int) -> tuple[int, int]:
        barrier.wait()
        return item, torch.get_num_threads()

    assert list(passes.map(run, range(4))) == [(item, 1) for item in range(4)]
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2], "a thread created later uses all threads"


def test_an_error_in_a_pass_is_raised(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        list(ParallelPasses(2).map(lambda item: 1 // item, [1, 0]))
