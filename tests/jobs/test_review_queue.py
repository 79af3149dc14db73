"""People's decisions about rows: claimed once, decided once, audited, and the job continues after the last."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from fixtures.reviews import filed
from sqlalchemy import delete, func, select, text, update

from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import ConflictError, InvalidError, NotFoundError
from reft_ray.jobs.fake_steps import FakeSteps
from reft_ray.jobs.job import Event, JobSpec, Options, Status
from reft_ray.jobs.job_rows import locked
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.review import LEASE_SECONDS, Action, Kind, Reviewer, State
from reft_ray.jobs.review_queue import Filter, ReviewQueue
from reft_ray.jobs.review_stats import counts, reasons, teacher_stats
from reft_ray.jobs.tables import review_counts, reviews
from reft_ray.telemetry import catalog

ADA, BOB = (Reviewer(name, {"type": "session", "session": {"user": name}}) for name in ("ada", "bob"))
APPROVE, REJECT = (Action.APPROVE, "harmless", ""), (Action.REJECT, "harmful_request", "")


@pytest.fixture
def queue(database):
    return ReviewQueue(JobStore(database))


@pytest.fixture
def waiting(queue):
    """A job that waits, and a function that files rows of it."""
    spec = JobSpec("tiny", "file-t", 1, options=Options(policy="review"))
    return queue.store.create("org", "acme", spec, {})


def test_the_nearest_row_is_claimed_first_and_once(queue, waiting, clock):
    queue.file(waiting, [filed(3), filed(1), filed(2, score=float("nan"))])
    assert [review.row_number for review in queue.list(Filter()).items] == [1, 3, 2]
    assert [review.row_number for review in queue.list(Filter(), order="age").items] == [3, 1, 2]
    first, second = queue.claim(ADA), queue.claim(BOB)
    assert (first.row_number, second.row_number) == (1, 3)
    assert queue.claim(ADA).id == first.id, "a reviewer gets a claimed row back"
    assert queue.claim(ADA, after=first.id).row_number == 2
    with pytest.raises(ConflictError, match="held by bob"):
        queue.decide([second.id], *APPROVE, ADA)
    with pytest.raises(ConflictError, match="held by bob"):
        queue.claim(ADA, review_id=second.id)
    clock.advance(LEASE_SECONDS + 1)
    assert queue.claim(ADA, review_id=second.id).held_by == "ada"
    queue.release(second.id, ADA)
    assert queue.claim(BOB, review_id=second.id).held_by == "bob"


def test_pages_continue_after_a_row(queue, waiting):
    queue.file(waiting, [filed(number, score=0.4) for number in range(1, 8)])
    first = queue.list(Filter(), limit=3)
    second = queue.list(Filter(), limit=3, after=first.items[-1].id)
    assert [item.row_number for item in (*first.items, *second.items)] == [1, 2, 3, 4, 5, 6]
    assert first.has_more
    with pytest.raises(InvalidError, match="no such review"):
        queue.list(Filter(), after="review_x")


def test_filing_again_changes_no_decision(queue, waiting):
    rows = [filed(1), filed(2)]
    queue.file(waiting, rows)
    queue.decide([queue.list(Filter()).items[0].id], *REJECT, ADA)
    queue.file(waiting, [*rows, filed(3)])
    assert counts(queue.database, Filter(state=None)) == {
        "pending": 2,
        "confirm": 0,
        "approved": 0,
        "rejected": 1,
        "withheld": 0,
    }


def counted(database):
    """Rows by the key of `review_counts`: counted one by one, and as the table has them."""
    key = [column.name for column in review_counts.primary_key]
    rows = select(*(reviews.c[name] for name in key), func.count()).group_by(*(reviews.c[name] for name in key))
    kept = select(*(review_counts.c[name] for name in key), review_counts.c.total).where(review_counts.c.total != 0)
    with database.read() as connection:
        return [sorted(map(tuple, connection.execute(query))) for query in (rows, kept)]


def test_counts_agree_with_the_rows_whoever_changes_them(queue, waiting):
    queue.file(waiting, [filed(1, reason="encoded_text"), filed(2), filed(3), filed(4, kind=Kind.KEPT)])
    queue.claim(ADA)
    queue.decide([queue.list(Filter()).items[0].id], *REJECT, ADA)
    queue.file(queue.store.create("org", "acme", waiting.spec, {}), [filed(1), filed(2, teacher="u")])
    with queue.database.write() as connection:
        connection.execute(update(reviews).where(reviews.c.row_number == 3).values(state=State.APPROVED))
        connection.execute(delete(reviews).where(reviews.c.row_number == 2))
    one_by_one, kept = counted(queue.database)
    assert kept == one_by_one
    assert len(kept) == 4
    everything = Filter(waiting.project_id, state=None)
    assert counts(queue.database, everything) == {
        "pending": 2,
        "confirm": 0,
        "approved": 1,
        "rejected": 1,
        "withheld": 0,
    }
    assert reasons(queue.database, everything) == {"score_above_review": 3, "encoded_text": 1}
    assert reasons(queue.database, Filter(row_number=1, state=None)) == {"encoded_text": 1, "score_above_review": 1}


def test_rows_of_an_older_version_are_counted_by_the_migration(queue, waiting):
    queue.database.migrate("0004")
    queue.file(waiting, [filed(1), filed(2)])
    queue.decide([queue.list(Filter()).items[0].id], *REJECT, ADA)
    queue.database.migrate()
    one_by_one, kept = counted(queue.database)
    assert kept == one_by_one
    assert len(kept) == 2


def test_filing_and_deciding_rows_of_one_job_lock_in_one_order(queue, waiting):
    """The job before the audit log; filing a row that was approved before once did the reverse, a deadlock."""
    queue.file(waiting, [filed(1)])
    queue.decide([queue.list(Filter()).items[0].id], *APPROVE, ADA)
    job = queue.store.create("org", "acme", waiting.spec, {})
    with ThreadPoolExecutor(1) as pool:
        with queue.database.write() as deciding:
            locked(deciding, job.id)
            filing = pool.submit(queue.file, job, [filed(1)])
            waits = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            while not queue.database.is_sqlite and not deciding.execute(waits).scalar_one():
                assert not filing.done()
            queue.store.audit.append_in(deciding, "review.approved", ADA.actor)
        filing.result(30)
    assert AuditLog(queue.database).verify().fault is None


def test_every_decision_is_an_entry_of_the_chain(queue, waiting):
    queue.file(waiting, [filed(1), filed(2)])
    one, two = queue.list(Filter()).items
    (done,) = queue.decide([one.id], Action.REJECT, "other_harmful", "threat in part 2", ADA)
    assert (done.state, done.reviewer, done.code, done.version) == (State.REJECTED, "ada", "other_harmful", 1)
    with pytest.raises(ConflictError, match="rejected by ada"):
        queue.decide([one.id], *APPROVE, BOB)
    with pytest.raises(ConflictError):
        queue.decide([two.id, one.id], *APPROVE, BOB)
    assert queue.get(two.id).state is State.PENDING, "all or none"
    with pytest.raises(ConflictError, match="has changed"):
        queue.decide([two.id], *APPROVE, BOB, version=4)
    entries = AuditLog(queue.database).entries()
    assert [(entry.type, entry.actor["session"]["user"], entry.data["comment"]) for entry in entries] == [
        ("review.rejected", "ada", "threat in part 2")
    ]
    assert AuditLog(queue.database).verify().fault is None


@pytest.mark.parametrize(
    ("action", "code", "comment", "message"),
    [
        (Action.APPROVE, "harmful_request", "", "not a reason to approve"),
        (Action.REJECT, "other_harmful", " ", "needs one"),
        (Action.REJECT, "illegal", "x" * 2001, "at most 2000"),
    ],
)
def test_a_decision_needs_a_reason(queue, waiting, action, code, comment, message):
    queue.file(waiting, [filed(1)])
    with pytest.raises(InvalidError, match=message):
        queue.decide([queue.list(Filter()).items[0].id], action, code, comment, ADA)
    with pytest.raises(NotFoundError):
        queue.decide(["review_x"], *APPROVE, ADA)


def test_a_decision_about_near_duplicates_leaves_those_that_another_person_holds(queue, waiting):
    queue.file(waiting, [filed(n, cluster="same") for n in (1, 2, 3)] + [filed(4)])
    first, held, *_ = queue.list(Filter()).items
    queue.claim(BOB, review_id=held.id)
    assert queue.duplicates(first) == 2
    decided = queue.decide([first.id], *REJECT, ADA, duplicates=True)
    assert [review.row_number for review in decided] == [1, 3]
    assert [review.row_number for review in queue.list(Filter()).items] == [2, 4]


def test_an_overturned_block_needs_a_second_person(queue, waiting):
    queue.second_person = True
    queue.file(waiting, [filed(1, decision="block"), filed(2)])
    block, review = queue.list(Filter()).items
    assert [queue.decide([item.id], *APPROVE, ADA)[0].state for item in (block, review)] == ["confirm", "approved"]
    with pytest.raises(ConflictError, match="another person"):
        queue.decide([block.id], *APPROVE, ADA)
    assert queue.claim(ADA, Filter(state=State.CONFIRM)) is None
    assert queue.claim(BOB, Filter(state=State.CONFIRM)).id == block.id
    (done,) = queue.decide([block.id], *APPROVE, BOB)
    assert (done.state, done.first_by, done.reviewer) == ("approved", "ada", "bob")
    types = [entry.type for entry in AuditLog(queue.database).entries()]
    assert types == ["review.first_approved", "review.approved", "review.approved"]


def test_an_approved_row_is_approved_in_the_projects_next_job(queue, waiting):
    queue.file(waiting, [filed(1), filed(2)])
    one, two = queue.list(Filter()).items
    queue.decide([one.id], *APPROVE, ADA)
    queue.decide([two.id], *REJECT, ADA)
    again = queue.store.create("org", "acme", waiting.spec, {})
    other = queue.store.create("org", "other", waiting.spec, {})
    for job in (again, other):
        queue.file(job, [filed(1), filed(2)])
    states = [(item.project_id, item.row_number, item.state) for item in queue.list(Filter(state=None), "age").items]
    assert states[2:] == [
        ("acme", 1, "approved"),
        ("acme", 2, "pending"),
        ("other", 1, "pending"),
        ("other", 2, "pending"),
    ]


def test_the_sample_of_kept_rows_blocks_no_job_and_estimates_misses(harness):
    steps = FakeSteps(kept_sample=3)
    job_id = harness.job(*["hello"] * 8, "a knife", "a bomb", policy="review")
    assert harness.drive(job_id, steps).status is Status.PAUSED
    queue = ReviewQueue(harness.jobs)
    sample = queue.list(Filter(kind=Kind.KEPT)).items
    rows = queue.list(Filter(kind=Kind.WITHHELD)).items
    assert (len(sample), len(rows)) == (3, 2)
    queue.decide([sample[0].id], *REJECT, ADA)
    queue.decide([item.id for item in sample[1:2]], *APPROVE, ADA)
    queue.decide([rows[0].id], *APPROVE, ADA)
    queue.decide([rows[1].id], *REJECT, ADA)
    job = harness.drive(job_id, steps)
    assert (job.status, harness.jobs.steps(job_id)["review"]["kept"]) == (Status.SUCCEEDED, 9)
    (stats,) = teacher_stats(harness.jobs.database)
    assert (stats.overturned.count, stats.overturned.of, stats.missed.count, stats.missed.of) == (1, 2, 1, 2)
    # Half of 2 withheld rows against the half of 8 kept ones that are harmless.
    assert stats.false_positives() == pytest.approx(1 / (1 + 4))
    assert harness.recorder.total(catalog.REVIEW_DECISIONS) == 2, "the sample is no withheld row"


def test_rows_that_are_all_decided_before_the_job_asks_do_not_stop_it(harness):
    job_id = harness.job("hi", "a knife", policy="review")
    queue = ReviewQueue(harness.jobs)

    class Early(FakeSteps):
        def screen(self, run, validation):
            result = FakeSteps.screen(self, run, validation)
            queue.decide([queue.list(Filter(job=job_id)).items[0].id], *APPROVE, ADA)
            return result

    assert harness.drive(job_id, Early()).status is Status.SUCCEEDED


def test_under_the_policy_filter_nobody_is_asked(harness):
    job = harness.drive(harness.job("hi", "a knife", policy="filter"))
    assert job.status is Status.SUCCEEDED
    queue = ReviewQueue(harness.jobs)
    assert [item.state for item in queue.list(Filter(state=None)).items] == ["withheld"]
    assert queue.claim(ADA) is None


@pytest.mark.parametrize("people", [10])
def test_ten_people_at_once_lose_nothing_and_decide_nothing_twice(database, people):
    store = JobStore(database)
    queue = ReviewQueue(store)
    job = store.create("org", "acme", JobSpec("tiny", "file-t", 1, options=Options(policy="review")), {})
    queue.file(job, [filed(number) for number in range(1, 41)])
    with database.write() as connection:
        store.record_step_in(connection, job, "ask", {})
        store.move_in(connection, job, Status.PAUSED, Event("asks"))
    made = [[] for _ in range(people)]
    errors = []

    def work(index: int) -> None:
        me = Reviewer(f"person-{index}", {"type": "session", "session": {"user": str(index)}})
        try:
            while (row := queue.claim(me)) is not None:
                made[index] += queue.decide([row.id], *(APPROVE if row.row_number % 2 else REJECT), me)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(people)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(review.row_number for each in made for review in each) == list(range(1, 41))
    assert store.get(job.id).status is Status.VALIDATING, "the job continues after the last decision"
    verification = AuditLog(database).verify()
    assert (verification.entries, verification.fault) == (40, None)
    one_by_one, kept = counted(database)
    assert kept == one_by_one


@pytest.mark.servers
def test_many_new_rows_are_counted_for_the_planner(new_postgres, monkeypatch):
    monkeypatch.setattr("reft_ray.jobs.review_queue.ANALYZED_ROWS", 30)
    with closing(Database.open(new_postgres())) as database:
        queue = ReviewQueue(JobStore(database))
        job = queue.store.create("org", "acme", JobSpec("tiny", "file-t", 1), {})
        seen = []
        for rows in (range(1, 30), range(30, 60)):
            queue.file(job, map(filed, rows))
            with database.read() as connection:
                counted = text("SELECT reltuples FROM pg_class WHERE relname = 'reviews'")
                seen.append(connection.execute(counted).scalar_one())
    assert seen == [-1, 59]
