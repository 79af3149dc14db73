"""Device and number format, freed memory, and parallel forward passes."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from reft_ray.core.errors import UsageError
from reft_ray.hf import compute
from reft_ray.hf.compute import (
    ParallelPasses,
    keep_faster_threads,
    parallel_passes_if_faster,
    resolve_dtype,
    use_threads,
)

_FAULTS = """
import resource
import torch
from reft_ray.hf.compute import keep_freed_memory

def use():
    return [torch.ones(1 << 20) for _ in range(20)]

def faults():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        use()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory()
print(faults())
"""


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="precision fp16: one of auto, float32, bfloat16"):
        resolve_dtype("fp16", "cpu")


@pytest.mark.parametrize(
    ("ratio", "sizes", "faster"), [(0.1, {128}, False), (1.1, {128, 1024}, False), (2.0, {128, 1024}, True)]
)
def test_no_large_product_is_measured_where_bfloat16_is_emulated(
    monkeypatch: pytest.MonkeyPatch, ratio: float, sizes: set[int], faster: bool
) -> None:
    measured = set()

    def rate(dtype: torch.dtype, device: str, size: int) -> float:
        measured.add(size)
        return ratio if dtype is torch.bfloat16 else 1.0

    monkeypatch.setattr(compute, "matmul_rate", rate)
    assert compute.bfloat16_is_faster.__wrapped__("cpu") is faster
    assert measured == sizes


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_not_faulted_in_again() -> None:
    run = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    default, kept = map(int, run.stdout.split())
    if default < 10_000:
        pytest.skip("this C library keeps freed memory by default")
    assert kept < default / 3


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Clock:
    """A time that passes only while a pass runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: dict[int, float]) -> Callable[[], None]:
        """A pass whose time depends on the number of threads."""

        def run() -> None:
            self.now += seconds[torch.get_num_threads()]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(compute, "time", found)
    return found


def test_passes_run_in_parallel_if_more_threads_do_not_make_one_faster(two_threads: None, clock: Clock) -> None:
    passes = parallel_passes_if_faster(clock.passes({1: 0.004, 2: 0.004}))
    assert passes is not None
    assert passes.count == 2
    assert parallel_passes_if_faster(clock.passes({1: 0.02, 2: 0.004})) is None
    torch.set_num_threads(1)
    assert parallel_passes_if_faster(clock.passes({})) is None


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


def test_a_run_keeps_the_number_of_threads_that_is_faster(two_threads: None, clock: Clock) -> None:
    assert keep_faster_threads(clock.passes({1: 0.02, 2: 0.004})) == torch.get_num_threads() == 2
    assert keep_faster_threads(clock.passes({1: 0.004, 2: 0.02})) == torch.get_num_threads() == 1


def test_a_resumed_run_computes_with_the_threads_of_before(two_threads: None, clock: Clock) -> None:
    assert keep_faster_threads(clock.passes({}), earlier=2) == 2
    assert keep_faster_threads(clock.passes({}), earlier=64) == 2
    assert keep_faster_threads(clock.passes({}), earlier=1) == torch.get_num_threads() == 1


def test_threads_are_the_cpus_unless_openmp_is_configured(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_ray.hf.compute.available_cpus", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    use_threads()
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    use_threads()
    assert torch.get_num_threads() == 3
    use_threads(2.5)
    assert torch.get_num_threads() == 2
    use_threads(0.5)
    assert torch.get_num_threads() == 1
