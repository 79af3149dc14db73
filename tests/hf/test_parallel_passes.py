"""Passes run side by side where threads do not help one of them; nobody else's threads are touched."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from reft_ray.hf.parallel_passes import ParallelPasses, parallel_passes_if_faster


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def taking(seconds: dict[int, float]):
    """A pass that takes so long on so many threads."""
    return lambda: time.sleep(seconds[torch.get_num_threads()])


def test_lanes_are_taken_where_threads_do_not_help(two_threads: None) -> None:
    lanes = parallel_passes_if_faster(taking({1: 0.004, 2: 0.004}))
    assert lanes is not None
    assert lanes.count == 2
    assert parallel_passes_if_faster(taking({1: 0.02, 2: 0.004})) is None
    torch.set_num_threads(1)
    assert parallel_passes_if_faster(taking({})) is None


def test_passes_run_at_the_same_time_on_one_thread_each(two_threads: None) -> None:
    lanes, meeting = ParallelPasses(2), threading.Barrier(2, timeout=10)

    def run(item: int) -> tuple[int, int]:
        meeting.wait()
        return item, torch.get_num_threads()

    assert list(lanes.map(run, range(4))) == [(item, 1) for item in range(4)]
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2], "a thread that comes later computes with all"


def test_an_error_in_a_lane_is_raised(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        list(ParallelPasses(2).map(lambda item: 1 // item, [1, 0]))
