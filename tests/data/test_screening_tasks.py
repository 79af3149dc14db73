"""What screening gives to Ray, run in this process: read tasks, the judging worker and the writing one."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from reft_ray.screening import distributed
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.dataset_threshold import load_threshold
from reft_ray.screening.distributed import _UnitsDatasource, _Worker, reading_tasks
from reft_ray.screening.file_parsing import shape_of
from reft_ray.screening.outputs import Output
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reading import plan_files
from reft_ray.screening.sources import find_sources
from reft_ray.screening.unit_worker import Job, Pass
from reft_ray.telemetry.recorder import NullRecorder
from reft_ray.testbed.word_scorer import WordScorer

CONFIG = ScreenConfig(limits=Limits(rows=8), findings=False)


class LocalRecorder(NullRecorder):
    """In place of the recorder that sends to an actor of the cluster."""

    def __init__(self, application: str) -> None:
        super().__init__()

    def flush(self) -> None:
        """Nothing was held."""


@pytest.mark.parametrize(("files", "blocks"), [(1, 7), (10, 5)])
def test_tasks_judge_and_write_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, blocks: int
) -> None:
    monkeypatch.setattr(distributed, "SharedRecorder", LocalRecorder)
    rows = [{"prompt": f"Q{n}" + " bomb" * (n % 9 == 0), "response": "A"} for n in range(50)]
    # One file of seven units, or ten small ones, two of which fill a unit's rows.
    for number in range(0, 50, 50 // files):
        lines = [json.dumps(row) + "\n" for row in rows[number : number + 50 // files]]
        (tmp_path / f"rows-{number:02}.jsonl").write_text("".join(lines))
    paths = [str(path) for path in sorted(tmp_path.glob("*.jsonl"))]
    screen(paths, str(tmp_path / "whole"), WordScorer, CONFIG)
    out = Output(str(tmp_path / "out"))
    plans = plan_files(find_sources(paths), CONFIG.limits)
    job = Job(WordScorer, CONFIG, [shape_of(plan, None, {}) for plan in plans], out.uri)
    (task,) = _UnitsDatasource(reading_tasks(plans), CONFIG.limits).get_read_tasks(1)
    tables = list(task())
    assert [table.num_rows for table in tables] == [1] * blocks
    judge = _Worker(Job(**{name: getattr(job, name) for name in Job.__dataclass_fields__} | {"step": Pass.JUDGE}))
    assert all(judge(table)["error"].to_pylist() == [None] for table in tables)
    threshold = load_threshold(Output(str(tmp_path / "whole")))
    fields = {name: getattr(job, name) for name in Job.__dataclass_fields__}
    writing = Job(**fields | {"step": Pass.WRITE, "threshold": threshold})
    writer = _Worker(writing)
    done = pa.concat_tables([writer(table) for table in tables])
    assert sum(unit["rows"] for row in done["done"].to_pylist() for unit in row) == 50
    assert done.num_rows == blocks
    parts = {name: out.read(name) for name in out.sizes("kept")}
    whole = Output(str(tmp_path / "whole"))
    assert parts == {name: whole.read(name) for name in whole.sizes("kept")}


def test_units_of_many_bytes_do_not_share_a_block(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"prompt": "Q" * 2000, "response": "A"}) + "\n")
    limits = Limits(rows=1000, bytes=2000)
    plans = plan_files(find_sources([str(tmp_path)]), limits)
    (task,) = _UnitsDatasource(reading_tasks(plans), limits).get_read_tasks(1)
    assert len(list(task())) == 4
