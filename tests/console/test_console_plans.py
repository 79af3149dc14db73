"""What a page reads does not grow with the queue, on both databases."""

from contextlib import contextmanager

import pytest
from fastapi.testclient import TestClient
from fixtures.review_service import ReviewService
from fixtures.reviews import filed
from sqlalchemy import event, text

from reft_ray.jobs.figures import Figures
from reft_ray.jobs.job import JobSpec, Options
from reft_ray.jobs.review import Action, Kind, Reviewer
from reft_ray.jobs.review_queue import Filter

ADA = Reviewer("ada", {"type": "session", "session": {"user": "ada"}})
PAGES = (
    "/console",
    "/console/queue",
    "/console/queue?job=JOB&reason=score_above_review",
    "/console/queue?order=age",
    "/console/queue?kind=kept",
    "/console/queue?kind=kept&order=age",
    "/console/reviews/ROW",
    "/console/jobs/JOB",
    "/v1/reviews/summary?job=JOB",
    "claim",
    "figures",
)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.servers)])
def service(request, tmp_path):
    url = None if request.param == "sqlite" else request.getfixturevalue("new_postgres")()
    service = ReviewService(tmp_path, url)
    yield service
    service.close()


@pytest.fixture
def job(service):
    principal = service.stores.tenants.authenticate(service.key("owner"))
    spec = JobSpec("tiny", "file-t", 1, options=Options(policy="review"))
    return service.stores.jobs.create(principal.organization_id, principal.project_id, spec, {})


@contextmanager
def counted(database):
    """The work of a block's queries as a list: steps of SQLite, or rows that PostgreSQL reads."""
    found, engine = [], database.engine
    if database.is_sqlite:

        def watch(connection, *_):
            connection.set_progress_handler(lambda: found.append(10), 10)

        event.listen(engine, "checkout", watch)
        yield found
        event.remove(engine, "checkout", watch)
        return
    seen = []

    def keep(_connection, _cursor, statement, parameters, *_):
        if statement.startswith("SELECT") and "review" in statement:
            seen.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", keep)
    yield found
    event.remove(engine, "before_cursor_execute", keep)
    with database.read() as connection:
        for statement, parameters in seen:
            explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
            (plan,) = connection.exec_driver_sql(explain, parameters).scalar_one()
            found.append(_rows(plan["Plan"]))


def _rows(node):
    """Rows that the scans of a plan read, those that they dropped included."""
    below = node.get("Plans", ())
    own = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
    return sum(map(_rows, below)) if below else own * node["Actual Loops"]


def test_no_page_reads_the_queue(service, job):
    queue, database = service.stores.reviews, service.stores.database
    sizes, work = (300, 3000), {}
    queue.file(job, [filed(n, kind=Kind.KEPT, decision="allow") for n in range(1, 11)])
    for size in sizes:
        queue.file(job, [filed(n) for n in range(11, size + 1)])
        first, second, *_ = queue.list(Filter(kind=Kind.WITHHELD)).items
        queue.decide([first.id], Action.REJECT, "harmful_request", "", ADA)
        if not database.is_sqlite:
            with database.write() as connection:
                connection.execute(text("ANALYZE"))
        with TestClient(service.app) as client:
            client.post("/console/sign-in", data={"key": service.key("operator")})
            headers = {"authorization": f"Bearer {service.key('operator')}"}
            for page in PAGES:
                with counted(database) as found:
                    if page == "figures":
                        readings = Figures(service.stores.jobs)
                        [*readings.quarantine(), *readings.oldest_pending(), *readings.overturned()]
                    elif page == "claim":
                        for chosen in (Filter(), Filter(kind=Kind.KEPT), Filter(job=job.id, kind=Kind.WITHHELD)):
                            queue.release(queue.claim(ADA, chosen).id, ADA)
                    else:
                        path = page.replace("JOB", job.id).replace("ROW", second.id)
                        assert client.get(path, headers=headers).status_code == 200
                work[page, size] = sum(found)
    small, large = sizes
    grown = {page: (work[page, small], work[page, large]) for page in PAGES}
    assert all(before > 0 for before, _ in grown.values()), grown
    assert all(after <= 1.5 * before + 100 for before, after in grown.values()), grown
