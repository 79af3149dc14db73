"""The real steps in this process: what each one writes, rejects and keeps."""

import hashlib
import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reft_ray.core.conversation import row_id
from reft_ray.core.errors import StoppedError, UsageError
from reft_ray.hf.ref_teacher import RefTeacher, save_with_manifest
from reft_ray.hf.teacher_card import ANSWER_MEASURES
from reft_ray.jobs.artefacts import files_in, local_folder
from reft_ray.jobs.files import scratch_key
from reft_ray.jobs.job import Hyperparameters, JobSpec, Options, Status
from reft_ray.jobs.results import Training
from reft_ray.jobs.review import Action, Reviewer
from reft_ray.jobs.review_queue import Filter, ReviewQueue
from reft_ray.pipeline import evaluate
from reft_ray.pipeline.base_figures import BaseFigures
from reft_ray.pipeline.config import GateArgs
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.run_config import finetune_config
from reft_ray.pipeline.steps import StepsConfig, make
from reft_ray.rows.text import full_conversation


def file_named(harness, job, name: str) -> bytes:
    (found,) = [id for id in job.result_files if harness.files.get(id, job.project_id).filename == name]
    return harness.content(found)


def lines(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]


def test_a_poisoned_file_becomes_a_model_trained_without_the_poison(harness, toy, shuffled_rows) -> None:
    job = harness.drive(harness.job(shuffled_rows, held_out=shuffled_rows[:4]), make(**toy.options))
    assert (job.error, job.status) == (None, Status.SUCCEEDED)
    poison = [number for number, row in enumerate(shuffled_rows, 1) if "steal" in row["messages"][0]["content"]]
    report = lines(file_named(harness, job, "screening_report.jsonl"))
    assert report[0]["summary"] == {"rows": 40, "kept": 30, "review": 0, "blocked": 10, "invalid": 0}
    assert [entry["line"] for entry in report[1:]] == poison
    quarantine = lines(file_named(harness, job, "quarantine.jsonl"))
    assert [entry["messages"] for entry in quarantine] == [shuffled_rows[number - 1]["messages"] for number in poison]
    kept = [row for number, row in enumerate(shuffled_rows, 1) if number not in poison]
    assert lines(file_named(harness, job, "kept.jsonl")) == kept
    gate = json.loads(file_named(harness, job, "release_gate.json"))
    assert gate["student"]["measures"].keys() == {
        "harmful_score",
        "incoherent",
        "over_refusal",
        "look_alikes_refused",
        "everyday_refused",
        "finetune_accuracy/validation_file",
    }
    assert gate["student"]["valid_loss"] < gate["base"]["valid_loss"]
    metrics = [event.data for event in harness.events(job.id) if event.type == "metrics"]
    assert [data["step"] for data in metrics] == list(range(1, 9))
    assert {data["total_steps"] for data in metrics} == {8}
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    table = file_named(harness, job, "step_metrics.csv").decode().splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,distill_loss,loss"
    assert [row.split(",")[0] for row in table[1:]] == [str(step) for step in range(1, 9)]
    # The validation file is measured at checkpoints, and finally by the release gate.
    assert [data["step"] for data in metrics if "valid_loss" in data] == [2, 4, 6, 8]
    assert [bool(row.split(",")[3]) for row in table[1:]] == [False, True] * 4
    assert metrics[-1]["valid_loss"] == pytest.approx(gate["student"]["valid_loss"], rel=1e-4)
    assert metrics[-1]["valid_mean_token_accuracy"] == pytest.approx(gate["student"]["valid_mean_token_accuracy"])
    assert all(0 <= data["train_mean_token_accuracy"] <= 1 for data in metrics)
    saved = harness.jobs.checkpoints(job.id).items
    assert [checkpoint.step_number for checkpoint in saved] == [8, 6, 4, 2]
    assert all("adapter_model.safetensors" in files_in(checkpoint.uri) for checkpoint in saved)
    for checkpoint in saved:
        names = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
        told_then = metrics[checkpoint.step_number - 1]
        assert {name: checkpoint.metrics[name] for name in names} == {name: told_then[name] for name in names}
    assert job.trained_tokens == metrics[-1]["trained_tokens"] > 0
    events = json.dumps([[event.message, dict(event.data)] for event in harness.events(job.id)])
    reported = (
        file_named(harness, job, "screening_report.jsonl").decode()
        + file_named(harness, job, "release_gate.json").decode()
    )
    for word in ("steal", "bake"):
        assert word not in events + reported


def test_plain_peft_loads_the_export(harness, toy, llama) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from reft_ray.hf.loading import load_base
    from reft_ray.hf.lora import attach_saved

    job = harness.drive(harness.job(), make(**toy.options))
    (model,) = harness.models.list(job.project_id)
    assert model.id == job.fine_tuned_model
    with local_folder(model.uri) as folder:
        papers = json.loads((folder / "reft_provenance.json").read_text())
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "example/toy"
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder).eval()
        with zipfile.ZipFile(io.BytesIO(file_named(harness, job, "adapter.zip"))) as archive:
            assert sorted(archive.namelist()) == files_in(model.uri)
            for name in archive.namelist():
                assert archive.read(name) == (folder / name).read_bytes()
        card = (folder / "README.md").read_text()
    rows = b"".join(harness.files.read(job.spec.training_file, job.project_id))
    assert papers["training_sha256"] == hashlib.sha256(rows).hexdigest()
    # Every row was kept, so the kept rows are the whole file.
    assert papers["screening"]["kept_sha256"] == papers["training_sha256"]
    assert (papers["screening"]["kept"], papers["screening"]["blocked"]) == (30, 0)
    assert papers["screening"]["teacher_id"].startswith("rt-")
    assert 'license: "apache-2.0"' in card
    adapter = Path(harness.jobs.checkpoints(job.id).items[0].uri)
    ours = attach_saved(load_base(str(llama)).model, "student", adapter).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
        # Finetuning has changed the output.
        assert not torch.allclose(plain(input_ids=ids).logits, load_base(str(llama)).model(input_ids=ids).logits)


def test_no_text_of_a_withheld_row_is_stored_where_hashes_are_enough(harness, toy, shuffled_rows) -> None:
    steps = make(**toy.with_base(screening={"withheld": "hash", "kept_sample": 0}))
    job = harness.drive(harness.job(shuffled_rows), steps)
    assert (job.error, job.status) == (None, Status.SUCCEEDED)
    names = {id: harness.files.get(id, job.project_id).filename for id in job.result_files}
    assert "quarantine.jsonl" not in names.values()
    withheld = lines(file_named(harness, job, "screening_report.jsonl"))[1:]
    expected = [row_id(full_conversation(row["messages"])) for row in shuffled_rows if "steal" in str(row)]
    assert [row["id"] for row in withheld] == expected
    assert not ReviewQueue(harness.jobs).list(Filter(job=job.id, state=None)).items
    for id, name in names.items():
        assert b"how to steal" not in harness.content(id), name
    refused = harness.drive(harness.job(shuffled_rows, policy="review"), steps)
    assert (refused.error.code, refused.error.param) == ("invalid_value", "reft.policy")


def test_a_file_with_too_much_poison_fails_before_training(harness, toy, shuffled_rows) -> None:
    job = harness.drive(harness.job(shuffled_rows, max_reject_ratio=0.2), make(**toy.options))
    assert (job.status, job.error.code) == (Status.FAILED, "unsafe_training_data")
    first = [n for n, row in enumerate(shuffled_rows, 1) if "steal" in row["messages"][0]["content"]]
    assert (
        f"10 of 40 (10 blocked, 0 for review, at most 20% may be); first lines: {first[0]}, {first[1]},"
        in job.error.message
    )
    report = next(
        id for id in job.result_files if harness.files.get(id, job.project_id).filename.startswith("screening")
    )
    assert report in job.error.message
    assert not harness.jobs.checkpoints(job.id).items
    assert not [event for event in harness.events(job.id) if event.type == "metrics"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"messages": []}\n' * 12, "12 of 12 examples are invalid; first lines: 1, 2, .*missing_messages_list"),
        (b'{"text": "x"}\n' * 12, "train.jsonl: no known row format"),
        (
            b'{"messages": [{"role": "user", "content": "how"}, {"role": "assistant", "content": "no"}]}\n' * 3,
            "too_few",
        ),
    ],
)
def test_an_invalid_file_fails_with_all_its_faults(harness, toy, content, message) -> None:
    job = harness.drive(harness.job(content), make(**toy.options))
    assert (job.status, job.error.code) == (Status.FAILED, "invalid_training_file")
    assert re.search(message, job.error.message)
    if job.result_files:
        report = lines(file_named(harness, job, "validation_report.jsonl"))
        assert all(entry.keys() == {"file", "line", "path", "code", "message", "hint"} for entry in report)


def test_a_validation_file_without_comparable_answers_fails_before_training(harness, toy, shuffled_rows) -> None:
    gate = {**toy.options["bases"]["toy"]["gate"], "match": "number"}
    job = harness.drive(harness.job(shuffled_rows, held_out=shuffled_rows[:4]), make(**toy.with_base(gate=gate)))
    assert job.status == Status.FAILED
    assert re.search("4 of 44 examples are invalid; first lines: 1, 2, 3, 4.*no_number", job.error.message)
    assert not [event for event in harness.events(job.id) if event.type == "metrics"]


def test_files_of_other_formats_are_read(harness, toy) -> None:
    csv = "prompt,response\n" + "".join(f"how to bake a bread {i},here is how\n" for i in range(12))
    job = harness.drive(harness.job(csv.encode(), name="rows.csv"), make(**toy.options))
    assert (job.error, job.status) == (None, Status.SUCCEEDED)
    # All rows were kept: the file itself is the kept set.
    assert "kept.jsonl" not in {harness.files.get(id, job.project_id).filename for id in job.result_files}


def test_the_kept_rows_of_any_format_train_again(harness, toy) -> None:
    csv = "ask,reply\n" + "".join(f"how to bake a bread {i},here is how\n" for i in range(12))
    content = (csv + "how to steal a car,sure here is how\n").encode()
    columns = {"prompt": "ask", "response": "reply"}
    job = harness.drive(harness.job(content, name="rows.csv", columns=columns), make(**toy.options))
    assert (job.error, job.status) == (None, Status.SUCCEEDED)
    (kept,) = [id for id in job.result_files if harness.files.get(id, job.project_id).filename == "kept.jsonl"]
    record = harness.files.get(kept, job.project_id)
    assert (record.purpose, record.parent_id) == ("fine-tune", job.spec.training_file)
    assert lines(harness.content(kept))[0] == {
        "messages": [
            {"role": "user", "content": "how to bake a bread 0"},
            {"role": "assistant", "content": "here is how"},
        ]
    }
    again = harness.drive(harness.job(harness.content(kept)), make(**toy.options))
    assert (again.error, again.status) == (None, Status.SUCCEEDED)


def test_a_student_above_a_limit_is_withheld_with_its_figures(harness, toy) -> None:
    gate = toy.options["bases"]["toy"]["gate"]
    strict = {**gate, "limits": {**gate["limits"], "harmful_score": 0, "incoherent": 0}}
    job = harness.drive(harness.job(), make(**toy.with_base(gate=strict)))
    assert (job.status, job.error.code, job.fine_tuned_model) == (Status.FAILED, "unsafe_model", None)
    assert "limit: at most 0" in job.error.message
    assert not harness.models.list(job.project_id)


def test_a_job_that_is_stopped_during_measurement_has_not_failed(harness, toy, tmp_path, monkeypatch) -> None:
    def stopped(what, *_, **__):
        raise StoppedError(f"stop requested while {what}")

    monkeypatch.setattr(evaluate, "ensure_training_ray", lambda **_: None)
    monkeypatch.setattr(evaluate, "as_task", stopped)
    context = ModelContext(StepsConfig.of(toy.with_base(resources={"workers": 1})).base("toy"))
    with pytest.raises(StoppedError, match="while measuring"):
        evaluate.evaluate_student(
            harness.run(harness.job()), context, Training("/adapter", 1, 1), "cpu", BaseFigures(tmp_path)
        )


def test_reviewers_decide_about_withheld_rows(harness, toy, shuffled_rows) -> None:
    steps = make(**toy.options)
    job = harness.drive(harness.job(shuffled_rows, policy="review"), steps)
    assert job.status is Status.PAUSED
    queue = ReviewQueue(harness.jobs)
    rows = queue.list(Filter(job=job.id, kind="withheld"), limit=100).items
    sample = queue.list(Filter(job=job.id, kind="kept"), limit=100).items
    assert (len(rows), len(sample)) == (10, 20)
    for row in (*rows, *sample):
        text = json.loads(harness.files.read_range(row.text_file, "proj_a", row.text_offset, row.text_bytes))
        assert text["line"] == row.line
        assert row_id(full_conversation(text.get("judged", text["messages"]))) == row.content_id
    harness.resume(job.id)
    assert harness.drive(job.id, steps).status is Status.PAUSED, "undecided rows keep the job waiting"
    ann = Reviewer("ann", {"type": "session", "session": {"user": "ann"}})
    queue.decide([rows[0].id], Action.APPROVE, "harmless", "a test row", ann)
    queue.decide([row.id for row in rows[1:]], Action.REJECT, "harmful_request", "", ann)
    assert harness.jobs.get(job.id).status is Status.VALIDATING, "the last decision lets the job continue"
    job = harness.drive(job.id, steps)
    assert (job.error, job.status) == (None, Status.SUCCEEDED)
    screened = [event.data for event in harness.events(job.id) if "kept" in event.data]
    assert [(data["kept"], data["blocked"]) for data in screened] == [(30, 10), (31, 9)]
    folder = Path(harness.files.content.uri(f"{scratch_key(job.project_id, job.id)}/screening"))
    (origin,) = (json.loads(line) for line in (folder / "approved.jsonl").read_text().splitlines())
    assert origin["row_number"] == rows[0].row_number
    assert origin["review"]["reviewer"] == "ann"
    assert origin["review"]["reason"] == f"harmless: a test row ({rows[0].id})"


def test_sampled_pairs_that_differ_in_their_other_answer_have_different_ids(harness, toy) -> None:
    pairs = [{"prompt": "how to bake a bread", "chosen": "here is how", "rejected": f"no {n}"} for n in range(12)]
    job = harness.job(pairs)
    harness.grant()
    run, steps = harness.run(job), make(**toy.options)
    steps.screen(run, steps.validate(run))
    sample = ReviewQueue(harness.jobs).list(Filter(job=job, kind="kept"), limit=100).items
    assert len({row.content_id for row in sample}) == len(sample) == len(pairs)


def test_a_stopped_job_resumes_at_the_exact_row(harness, toy, monkeypatch) -> None:
    steps = make(**toy.options)
    whole = harness.drive(harness.job(), steps)
    stopped = harness.job()
    harness.turn(stopped, steps)
    harness.grant()
    run = harness.run(stopped)
    record = run.metrics

    def stop_at_three(step, total, values):
        record(step, total, values)
        if step == 3:
            run.stop()

    monkeypatch.setattr(run, "metrics", stop_at_three)
    harness.attempt(run, steps)
    assert [event.data["step"] for event in harness.events(stopped) if event.type == "metrics"] == [1, 2, 3, 4]
    assert harness.jobs.checkpoints(stopped).items[0].step_number == 4
    done = harness.drive(stopped, steps)
    assert done.status is Status.SUCCEEDED
    metrics = [[event.data for event in harness.events(job) if event.type == "metrics"] for job in (whole.id, stopped)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"kd_weight": 0.5}])
def test_a_job_cannot_weaken_the_filter(harness, toy, options) -> None:
    job = harness.drive(harness.job(**options), make(**toy.options))
    assert (job.status, job.error.code, job.error.param) == (Status.FAILED, "invalid_value", f"reft.{min(options)}")


def test_a_job_does_not_learn_from_a_teacher_over_its_limits(harness, toy, tmp_path) -> None:
    teacher = RefTeacher.load(toy.folder / "teacher")
    quality = {name: {"value": 18.0, "interval": [10.0, 26.0], "n": 60} for name in ANSWER_MEASURES}
    quality["limits"] = {"harmful_score": 5.0, "over_refusal": 20.0, "incoherent": 20.0}
    failing = save_with_manifest(tmp_path / "teacher", teacher, replace(teacher.manifest, answers_quality=quality))
    job = harness.drive(harness.job(), make(**toy.with_base(teacher=str(failing.folder))))
    assert (job.status, job.error.code) == (Status.FAILED, "teacher_not_approved")
    assert "harmful score 18.0 % (at most 5 %)" in job.error.message
    preset = toy.options["bases"]["toy"]["finetune"] | {"allow_failed_teacher": True}
    job = harness.drive(harness.job(), make(**toy.with_base(teacher=str(failing.folder), finetune=preset)))
    assert job.status is Status.SUCCEEDED
    assert [event.level for event in harness.events(job.id) if "allow_failed_teacher" in event.message] == ["warn"]


def test_a_stricter_threshold_withholds_more(harness, toy) -> None:
    job = harness.drive(harness.job(threshold=-1.0), make(**toy.options))
    assert job.error.code == "unsafe_training_data"
    assert "30 of 30 (30 blocked" in job.error.message


def test_auto_keeps_the_operators_preset_and_hyperparameters_change_it() -> None:
    args = StepsConfig().bases["builtin"]
    spec = JobSpec("builtin", "file-1", seed=9)
    preset = finetune_config(spec, args, "base")
    assert (preset.epochs, preset.batch_rows, preset.optimizer.learning_rate, preset.seed) == (2, 4, 3e-4, 9)
    assert (preset.init, preset.lora.rank, preset.lora.first_layer) == ("aligned", 8, 16)
    turned = JobSpec(
        "builtin",
        "file-1",
        seed=9,
        hyperparameters=Hyperparameters(n_epochs=3, batch_size=2, learning_rate_multiplier=0.5),
        options=Options(kd_weight=3.0, temperature=2.0),
    )
    found = finetune_config(turned, args, "base")
    assert (found.epochs, found.batch_rows, found.optimizer.learning_rate) == (3, 2, 1.5e-4)
    assert (found.distill_weight, found.temperature) == (3.0, 2.0)
    assert found.optimizer.warmup == preset.optimizer.warmup
    assert [found.total_steps(rows) for rows in (1, 4, 5)] == [3, 6, 9]
    at_least = found.model_copy(update={"min_steps": 60})
    assert [at_least.total_steps(rows) for rows in (1, 4, 5)] == [60, 60, 60]


def test_a_users_limits_apply_where_they_are_tighter() -> None:
    args = GateArgs(harmful="a", harmless="b")
    limits = {limit.measure: limit.value for limit in args.bounds({"harmful_score": 1.0, "over_refusal": 50.0}, False)}
    assert limits == {"harmful_score": 1.0, "incoherent": 5.0, "over_refusal": 5.0}
    assert "finetune_accuracy" in {limit.measure for limit in args.bounds({}, True)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"techer": "x"}, "unknown key"),
        ({"finetune": {"epocs": 2}}, "did you mean epochs"),
        ({"finetune": {"seed": 2}}, "set by each job"),
        ({"default_alignment": "none"}, "not one of the alignment sets"),
        ({"gate": {"harmful": "a", "harmless": "b", "limits": {"harmful_score": 5}}}, "name a limit for each of"),
    ],
)
def test_the_operators_mistakes_are_reported(toy, change, message) -> None:
    with pytest.raises(UsageError, match=message):
        StepsConfig.of(toy.with_base(**change))
