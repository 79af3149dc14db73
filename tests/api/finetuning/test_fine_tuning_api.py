"""`/v1/fine_tuning` through the openai client; tests/jobs/test_lifecycle.py runs the jobs."""

import httpx
import openai
import pytest

from reft_ray.jobs.job import Event, JobSpec, Status
from reft_ray.jobs.lease import Leases

REQUIRED = {
    "id",
    "object",
    "created_at",
    "model",
    "organization_id",
    "result_files",
    "seed",
    "status",
    "training_file",
    "hyperparameters",
    "error",
    "fine_tuned_model",
    "finished_at",
    "trained_tokens",
    "validation_file",
}
WANDB = {"type": "wandb", "wandb": {"project": "p"}}


@pytest.fixture
def create(client, training_file):
    def create(**options):
        return client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": training_file} | options)

    return create


def test_a_job_has_every_required_key(create, client):
    job = create(
        suffix="mine",
        seed=42,
        metadata={"team": "red"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 0.5}},
        },
        extra_body={"reft": {"policy": "fail", "kd_weight": 0.5, "gate": {"harmful_score": 2}}},
    )
    assert set(job.model_dump()) >= REQUIRED
    assert (job.object, job.status, job.seed) == ("fine_tuning.job", "validating_files", 42)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
    assert job.method.supervised.hyperparameters.learning_rate_multiplier == 0.5
    assert job.model_extra["reft"]["policy"] == "fail"
    assert job.model_extra["reft"]["gate"] == {"harmful_score": 2.0}
    assert (job.error, job.result_files, job.metadata) == (None, [], {"team": "red"})
    assert client.fine_tuning.jobs.retrieve(job.id) == job


def test_the_deprecated_hyperparameters_still_count(create):
    assert create(hyperparameters={"n_epochs": 4}).hyperparameters.n_epochs == 4


@pytest.mark.parametrize(
    ("options", "param", "code", "message"),
    [
        ({"model": "gpt-4"}, "model", "model_not_available", "choose from: tiny"),
        ({"training_file": "file-none"}, "training_file", "invalid_training_file", "file-none"),
        ({"validation_file": "file-none"}, "validation_file", "invalid_validation_file", "file-none"),
        ({"method": {"type": "dpo"}}, "method.type", "unsupported_method", "dpo"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "invalid_value", "50"),
        ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs", "unknown_parameter", "hyperparameters.n_epochs"),
        ({"suffix": "a/b"}, "suffix", "invalid_value", "suffix"),
        ({"seed": -1}, "seed", "invalid_value", "seed"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value", "512"),
        ({"metadata": {"k": "a\0b"}}, "metadata.k", "invalid_value", "pattern"),
        ({"integrations": [WANDB]}, "integrations", "unsupported_integration", "not supported"),
        ({"extra_body": {"reft": {"format": "chatml"}}}, "reft.format", "invalid_value", "sharegpt"),
        ({"extra_body": {"reft": {"speakers": {"x": "boss"}}}}, "reft.speakers.x", "invalid_value", "assistant"),
        ({"extra_body": {"reft": {"polcy": "fail"}}}, "reft.polcy", "unknown_parameter", "'reft.policy'"),
        ({"extra_body": {"policy": "fail"}}, "policy", "unknown_parameter", "'reft.policy'"),
        ({"extra_body": {"reft": {"policy": "allow"}}}, "reft.policy", "invalid_value", "filter"),
        ({"extra_body": {"reft": {"gate": {"harmful_score": 9}}}}, "reft.gate.harmful_score", "invalid_value", "5"),
        ({"extra_body": {"reft": {"max_reject_ratio": 0.9}}}, "reft.max_reject_ratio", "invalid_value", "0.5"),
        (
            {"extra_body": {"reft": {"alignment_dataset": "x"}}},
            "reft.alignment_dataset",
            "invalid_value",
            "safe-v1",
        ),
    ],
)
def test_invalid_parameters_are_named(create, options, param, code, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        create(**options)
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")


def test_an_error_is_about_its_field_alone_and_null_is_the_default(create):
    with pytest.raises(openai.BadRequestError) as caught:
        create(hyperparameters={"n_epochs": "3", "learning_rate_multiplier": -1})
    assert caught.value.param == "hyperparameters.n_epochs"
    assert "greater than 0" not in caught.value.message
    job = create(hyperparameters={"n_epochs": 3, "batch_size": None, "learning_rate_multiplier": None})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, "auto")


def test_a_missing_parameter_is_named(service):
    headers = {"authorization": f"Bearer {service.secret()}"}
    answer = httpx.post(f"{service.url}/v1/fine_tuning/jobs", json={"model": "tiny"}, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "missing_required_parameter"
    assert answer.json()["error"]["param"] == "training_file"
    for body in (b"", b"[]", b"nope"):
        assert httpx.post(f"{service.url}/v1/fine_tuning/jobs", content=body, headers=headers).status_code == 400


@pytest.mark.parametrize("option", ['"kd_weight": 1e999', '"temperature": Infinity', '"gate": {"incoherent": 1e999}'])
def test_no_infinity_is_stored(service, training_file, option):
    headers = {"authorization": f"Bearer {service.secret()}", "content-type": "application/json"}
    body = f'{{"model": "tiny", "training_file": "{training_file}", "reft": {{{option}}}}}'
    answer = httpx.post(f"{service.url}/v1/fine_tuning/jobs", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert "finite" in answer.json()["error"]["message"]


@pytest.mark.parametrize("none", [None, []])
def test_empty_integrations_are_accepted(create, none):
    assert create(integrations=none).integrations == []


def test_a_file_for_another_purpose_is_refused(create, client):
    other = client.files.create(file=("x.txt", b"x"), purpose="user_data").id
    with pytest.raises(openai.BadRequestError, match="needs 'fine-tune'"):
        create(training_file=other)


def test_a_repeated_request_with_a_key_makes_one_job(create, client):
    headers = {"Idempotency-Key": "once"}
    first = create(suffix="a", extra_headers=headers)
    assert create(suffix="a", extra_headers=headers).id == first.id
    assert create(suffix="a").id != first.id
    with pytest.raises(openai.ConflictError, match="a different request"):
        create(suffix="b", extra_headers=headers)


def test_45_jobs_page_newest_first_and_filter_by_metadata(service, rows):
    client = service.client("many-jobs")
    file = client.files.create(file=("train.jsonl", rows), purpose="fine-tune").id
    made = []
    for n in range(45):
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file, metadata={"n": str(n % 2)} if n else {})
        client.fine_tuning.jobs.cancel(job.id)
        made.append(job.id)
    assert [job.id for job in client.fine_tuning.jobs.list()] == made[::-1]
    assert len(client.fine_tuning.jobs.list(limit=20).data) == 20
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"}, limit=7)] == made[1::2][::-1]
    plain = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert [job.id for job in plain] == made[:1]


def test_events_and_checkpoints_page(service, client):
    jobs = service.stores.jobs
    job = jobs.create("org-acme", service.project_id, JobSpec("tiny", "file-1", 1), {})
    attempt = Leases(jobs).claim(job)
    Leases(jobs).acquire(job.id, attempt, "me")
    for step in range(1, 45):
        jobs.append(job.id, Event(f"Step {step}", type="metrics", data={"step": step, "train_loss": 1.0}))
        jobs.add_checkpoint(job.id, "me", step, f"/c/{step}", {"train_loss": 1.0, "step": float(step)})
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=20))
    assert [event.message for event in events[:-1]] == [f"Step {step}" for step in range(44, 0, -1)]
    assert (events[0].type, events[0].data, events[0].object) == (
        "metrics",
        {"step": 44, "train_loss": 1.0},
        "fine_tuning.job.event",
    )
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [item.step_number for item in checkpoints] == list(range(44, 0, -1))
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{job.model_name}:ckpt-step-44"
    page = client.fine_tuning.jobs.checkpoints.list(job.id, limit=1).model_dump()
    assert page["first_id"] == page["last_id"] == checkpoints[0].id
    client.fine_tuning.jobs.cancel(job.id)


def test_pause_resume_and_cancel_take_no_body_and_end_where_they_should(create, client):
    job = create()
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "validating_files"
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at >= cancelled.created_at
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert messages == [
        "Fine-tuning job cancelled",
        "Fine-tuning job resumed",
        "Fine-tuning job paused",
        f"Created fine-tuning job: {job.id}",
    ]


@pytest.mark.parametrize(("verb", "code"), [("cancel", "cancellable"), ("pause", "pausable"), ("resume", "resumable")])
def test_a_conflict_is_not_retried(create, client, service, verb, code):
    job = create()
    client.fine_tuning.jobs.cancel(job.id)
    asked = []
    with (
        openai.OpenAI(
            base_url=f"{service.url}/v1",
            api_key=service.secret(),
            http_client=_listening(asked),
        ) as counting,
        pytest.raises(openai.ConflictError) as caught,
    ):
        getattr(counting.fine_tuning.jobs, verb)(job.id)
    assert caught.value.code == f"job_not_{code}"
    assert len(asked) == 1


def _listening(asked):
    return openai.DefaultHttpxClient(event_hooks={"request": [asked.append]})


def test_a_job_of_another_project_does_not_exist(create, service):
    job = create()
    jobs = service.client("stranger").fine_tuning.jobs
    for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError) as caught:
            call(job.id)
        assert (caught.value.param, caught.value.code) == ("fine_tune_id", "fine_tune_not_found")
    assert job.id not in [item.id for item in jobs.list()]
    assert service.stores.jobs.get(job.id).status is Status.VALIDATING


def test_a_file_in_use_is_not_deleted(create, client, training_file):
    job = create()
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(training_file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(training_file).deleted


def test_an_estimate_comes_before_the_launch(client, training_file):
    body = {"model": "tiny", "training_file": training_file, "hyperparameters": {"n_epochs": 2, "batch_size": 4}}
    result = client.post("/fine_tuning/jobs/estimate", body=body, cast_to=dict)
    assert (result["rows"], result["steps"], result["exact_tokens"]) == (10, 6, False)
    assert result["trained_tokens"] == 2 * result["tokens_per_epoch"] > 0
    # 30 s to start, 10 rows at 500/s, tokens at 1000/s with a tenth for the gate
    assert result["seconds"] == pytest.approx(30 + 10 / 500 + result["trained_tokens"] / 1000 * 1.1)
    assert result["device_hours"] == pytest.approx(result["seconds"] / 3600)
    amount = 0.5 + 2 * result["device_hours"] + result["trained_tokens"] / 1000
    assert result["cost"] == {"amount": pytest.approx(amount, abs=1e-4), "currency": "EUR"}
    # Without a speed there are no hours, and no price that depends on them; without a price there is none at all.
    for model in ("builtin", "org/slashed"):
        unknown = client.post("/fine_tuning/jobs/estimate", body=body | {"model": model}, cast_to=dict)
        assert (unknown["seconds"], unknown["cost"]) == (None, None)


def test_checkpoints_are_shared_within_the_organisation_only(service, client):
    stores = service.stores
    job = stores.jobs.create("org-acme", service.project_id, JobSpec("tiny", "file-1", 1), {})
    leases = Leases(stores.jobs)
    leases.acquire(job.id, leases.claim(job), "me")
    stores.jobs.add_checkpoint(job.id, "me", 5, "/c/5", {})
    for status in (Status.QUEUED, Status.RUNNING):
        stores.jobs.move(job.id, status, Event("on"))
    with stores.database.write() as connection:
        stores.models.register_in(
            connection,
            stores.jobs.move_in(connection, stores.jobs.get(job.id), Status.SUCCEEDED, Event("done")),
            "/a",
        )
    name = job.checkpoint_name(5)
    sibling = stores.tenants.authenticate(service.secret("two")).project_id
    foreign = stores.tenants.authenticate(service.secret("x", organization="other")).project_id
    permissions = client.fine_tuning.checkpoints.permissions
    made = list(permissions.create(name, project_ids=[sibling]))
    assert [item.project_id for item in made] == [sibling]
    with pytest.raises(openai.BadRequestError):
        permissions.create(name, project_ids=[foreign])
    listed = httpx.get(
        f"{service.url}/v1/fine_tuning/checkpoints/{name}/permissions",
        headers={"authorization": f"Bearer {service.secret()}"},
    ).json()
    assert [item["id"] for item in listed["data"]] == [made[0].id]
    assert stores.models.checkpoint_uri(name, sibling)[1] == "/c/5"
    assert permissions.delete(made[0].id, fine_tuned_model_checkpoint=name).deleted
    with pytest.raises(openai.NotFoundError):
        service.client("two").fine_tuning.checkpoints.permissions.create(name, project_ids=[sibling])
