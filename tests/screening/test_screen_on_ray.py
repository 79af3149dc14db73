"""Screening on Ray: the same output as in one process, also after killed processes."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from reft_ray.core.errors import ReftError, UsageError
from reft_ray.rows.text import read_messages
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept_rows import KEPT, kept_dataset, kept_rows
from reft_ray.screening.ranges import Limits
from reft_ray.testbed.word_scorer import WordScorer

# Ray sets its own deprecated fields when it copies a DataContext.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("shared_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

IN_PROCESS = ScreenConfig(limits=Limits(rows=8))
ON_RAY = ScreenConfig(limits=Limits(rows=8), small_rows=0, actors=2, cpus_per_actor=0.5)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def slow_scorer(pids: Path, seconds: float):
    """A factory that writes its process id and makes a slow scorer."""

    def make():
        import os
        import time

        from reft_ray.testbed.word_scorer import WordScorer

        class Slow(WordScorer):
            def score(self, texts):
                time.sleep(seconds)
                return super().score(texts)

        (pids / str(os.getpid())).touch()
        return Slow()

    return make


@pytest.fixture
def whole(dataset, tmp_path):
    """The output of an uninterrupted run in one process."""
    screen([str(dataset)], str(tmp_path / "whole"), WordScorer, IN_PROCESS)
    return contents(tmp_path / "whole")


def test_the_output_is_the_same_as_in_one_process(dataset, tmp_path, whole):
    progress = []
    screen([str(dataset)], str(tmp_path / "out"), WordScorer, ON_RAY, progress.append)
    assert contents(tmp_path / "out") == whole
    assert progress[-1].done == 210


def test_a_killed_actor_changes_nothing(dataset, tmp_path, whole):
    pids = tmp_path / "pids"
    pids.mkdir()
    killed = []

    def kill_one(progress):
        if not killed:
            killed.append(int(next(pids.iterdir()).name))
            os.kill(killed[0], signal.SIGKILL)

    screen([str(dataset)], str(tmp_path / "out"), slow_scorer(pids, 0.2), ON_RAY, kill_one)
    assert killed
    assert {int(path.name) for path in pids.iterdir()} > set(killed)
    assert contents(tmp_path / "out") == whole


def test_a_killed_driver_resumes_to_the_same_output(dataset, tmp_path, whole):
    script = """
import sys
from pathlib import Path
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.ranges import Limits
from reft_ray.testbed.word_scorer import WordScorer

class Slow(WordScorer):
    def score(self, texts):
        import time
        time.sleep(0.1)
        return super().score(texts)

config = ScreenConfig(limits=Limits(rows=8), small_rows=0, cpus_per_actor=0.5)
screen([sys.argv[1]], sys.argv[2], Slow, config, lambda progress: print(progress.done, flush=True))
"""
    command = [sys.executable, "-c", script, str(dataset), str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[2])}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    with driver:
        assert driver.stdout is not None
        for _ in range(3):
            assert driver.stdout.readline()
        driver.kill()
    done = len(list((tmp_path / "out" / ".screen" / "judged").glob("*.arrow")))
    assert 3 <= done < 27
    progress = []
    screen([str(dataset)], str(tmp_path / "out"), WordScorer, IN_PROCESS, progress.append)
    assert progress[0].resumed >= 24
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(("raised", "expected"), [(UsageError("bad guard"), UsageError), (KeyError("x"), ReftError)])
def test_errors_of_workers_reach_the_caller(dataset, tmp_path, raised, expected):
    def make():
        class Failing(WordScorer):
            def score(self, texts):
                raise raised

        return Failing()

    with pytest.raises(expected) as failed:
        screen([str(dataset)], str(tmp_path / "out"), make, ON_RAY)
    assert str(raised) in str(failed.value)


def test_kept_rows_reach_the_trainer_in_order(dataset, tmp_path):
    out = str(tmp_path / "out")
    screen([str(dataset)], out, WordScorer, IN_PROCESS)
    rows = kept_dataset(out)
    assert rows.schema().base_schema.equals(KEPT)
    table = pa.concat_tables(rows.iter_batches(batch_size=None, batch_format="pyarrow"))
    read = [(row["row_number"], read_messages(row["messages"])) for row in table.to_pylist()]
    assert read == list(kept_rows(out))


def test_a_finished_output_is_not_reused_for_another_teacher(dataset, tmp_path):
    out = str(tmp_path / "out")
    screen([str(dataset)], out, WordScorer, ON_RAY)
    assert screen([str(dataset)], out, WordScorer, ON_RAY).judges["teacher"] == "rt-words"
    with pytest.raises(ReftError, match="judged by different teachers"):
        screen([str(dataset)], out, partial(WordScorer, "rt-other"), ON_RAY)
