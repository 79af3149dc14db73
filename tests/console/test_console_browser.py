"""The console in Chromium, over the real application and SQLite."""

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from console.browser_kit import CHROMIUM, PHONE, Person, chromium
from console.test_console_pages import HOSTILE

from reft_ray.jobs.fake_steps import FakeSteps
from reft_ray.jobs.job import Status
from reft_ray.jobs.review_queue import Filter

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.servers,
    pytest.mark.skipif(not os.access(CHROMIUM, os.X_OK), reason="chromium is not installed (apt-get install chromium)"),
]
AXE = Path(importlib.util.find_spec("axe_core_python").origin).parent / "axe.min.js"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def person(review_service, serving, browser):
    """Sign a person in; the fixture fails where a page asked, loaded from elsewhere or had an error."""
    people = []
    with serving(review_service.app) as url:

        def sign_in(role="curator", name="ann", project="one", **options):
            people.append(Person(browser, url, review_service.key(role, name, project), **options))
            return people[-1]

        yield sign_in
        for each in people:
            each.context.close()
    assert [fault for each in people for fault in each.faults if "409" not in fault] == []


@pytest.fixture
def waiting(review_service):
    texts = (*(f"hello {n}" for n in range(6)), "a knife 1", "a knife 2", "a sharp knife", "a bomb")
    job = review_service.drive(review_service.job(*texts))
    assert job.status is Status.PAUSED
    return job


def test_a_curator_clears_the_queue_with_keys_and_the_job_ends(review_service, person, waiting):
    curator = person()
    curator.go(f"/queue?job={waiting.id}&kind=withheld")
    curator.key("n")
    page = curator.page
    assert page.locator("#text").evaluate("node => node.classList.contains('hidden')"), "the text is blurred"
    page.keyboard.press("v")
    assert not page.locator("#text").evaluate("node => node.classList.contains('hidden')")
    assert page.locator(".part.decided h3").inner_text().startswith("messages[0].user")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    first = page.url
    curator.key("s")
    assert page.url != first, "skipped"
    decisions = 0
    while "/reviews/" in page.url:
        if page.locator("input[name=duplicates]").count():
            page.keyboard.press("d")
        page.keyboard.press("2")
        curator.key("r" if "block" in page.locator("dl.facts").first.inner_text() else "a")
        decisions += 1
        assert decisions < 6
    reviews = review_service.stores.reviews
    states = {item.line: (str(item.state), item.code) for item in reviews.decided(waiting.id)}
    assert states == {
        **dict.fromkeys((7, 8, 9), ("approved", "counter_speech")),
        10: ("rejected", "harmful_answer"),
    }
    assert decisions == 3, "two near-duplicates in one decision"
    curator.go(f"/jobs/{waiting.id}")
    with review_service.driving():
        page.locator(".badge.succeeded").first.wait_for()
    assert page.get_by_role("link", name="ft:tiny").count() >= 1
    assert page.locator("polyline.training").count() == 1


def test_two_people_on_one_row(review_service, person, waiting):
    ann, bob = person(), person(name="bob")
    for each in (ann, bob):
        each.go("/queue?kind=withheld")
        each.key("n")
    assert ann.page.url != bob.page.url, "a claimed row is given to one person"
    row = ann.page.url.partition("/reviews/")[2].partition("?")[0]
    bob.go(f"/reviews/{row}")
    bob.key("r")
    assert "held by ann" in bob.page.get_by_role("alert").inner_text()
    ann.key("r")
    assert review_service.stores.reviews.get(row).reviewer.startswith("ann")


def test_an_appeal_from_a_customer_to_its_answer(review_service, person, waiting):
    row = review_service.stores.reviews.list(Filter(job=waiting.id, kind="withheld"), "age").items[0]
    owner, curator = person("owner"), person(name="bob")
    owner.go(f"/reviews/{row.id}")
    owner.page.get_by_label("Appeal").fill("It is about a kitchen knife.")
    owner.page.get_by_role("button", name="Appeal").click()
    owner.page.wait_for_url("**/appeals/appeal_*")
    address = owner.page.url
    curator.go("/appeals")
    curator.page.get_by_role("link", name="appeal_").click()
    assert "kitchen knife" in curator.page.locator("main").inner_text()
    curator.page.get_by_label("Answer").fill("Granted: it is harmless.")
    curator.page.get_by_role("button", name="Grant").click()
    curator.page.get_by_text("Granted: it is harmless.").wait_for()
    owner.page.goto(address)
    text = owner.page.locator("main").inner_text()
    assert "Granted: it is harmless." in text
    assert "bob" not in text
    assert review_service.stores.reviews.get(row.id).state == "approved"


def test_two_leads_sign_a_release(review_service, person):
    bad = FakeSteps(harmful_score=9.0)
    job = review_service.drive(review_service.job("hello", policy="filter"), bad)
    for name in ("ann", "bob"):
        lead = person("lead", name)
        lead.go(f"/releases/{job.id}")
        assert "harmful_score" in lead.page.locator("table").inner_text()
        lead.page.get_by_label("Why").fill(f"Measured by {name}.")
        lead.page.get_by_role("button", name="Sign the release").click()
        lead.page.get_by_text(f"Measured by {name}.").wait_for()
    assert review_service.drive(job, bad).status is Status.SUCCEEDED


def test_nothing_that_a_row_contains_runs_or_loads(review_service, person):
    job = review_service.drive(review_service.job("hello", *HOSTILE))
    curator = person()
    for row in review_service.stores.reviews.list(Filter(job=job.id, kind="withheld"), "age").items:
        page = curator.go(f"/reviews/{row.id}")
        page.keyboard.press("v")
        assert page.locator("main script, main img, main style, main iframe").count() == 0
        assert page.locator(".words").first.is_visible()
        assert page.evaluate("getComputedStyle(document.querySelector('.words')).unicodeBidi") == "isolate"
        page.goto(f"{page.url}/plain".replace("?", ""))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_and_fits_a_phone(review_service, person, waiting, scheme):
    row = review_service.stores.reviews.list(Filter(job=waiting.id, kind="withheld")).items[0]
    withheld = review_service.drive(review_service.job("hello", policy="filter"), FakeSteps(harmful_score=9.0))
    done = review_service.drive(review_service.job("hello", policy="filter"))
    owner = review_service.stores.tenants.authenticate(review_service.key("owner"))
    appeal = review_service.stores.appeals.of_row(row.id, "Please.", owner.reviewer, owner.project_id)
    someone = person("operator", color_scheme=scheme, viewport=PHONE)
    paths = ["", "/jobs", f"/jobs/{waiting.id}", f"/jobs/{done.id}", f"/jobs/{waiting.id}/file?threshold=0.3", "/queue"]
    paths += [f"/reviews/{row.id}", "/appeals", f"/appeals/{appeal.id}", "/releases", f"/releases/{withheld.id}"]
    paths += ["/models", f"/models/{done.fine_tuned_model}", "/teacher", "/admin", "/audit?verify=yes"]
    faults = {}
    for path in paths:
        page = someone.go(path)
        page.keyboard.press("v")
        wide = page.evaluate("document.documentElement.scrollWidth")
        # Under the console's policy no script can be injected into the page; an isolated world may run one.
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        serious = [item["id"] for item in found if item["impact"] in ("serious", "critical")]
        if serious or wide > PHONE["width"]:
            nodes = [node["html"][:120] for item in found if item["id"] in serious for node in item["nodes"][:3]]
            faults[path] = (serious, wide, nodes)
    assert faults == {}


def test_a_row_is_decided_with_the_keyboard_alone(review_service, person, waiting):
    curator = person()
    page = curator.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent").startswith("Begin"):
            break
    curator.key("Enter")
    assert "/reviews/" in page.url
    page.get_by_label("Comment").focus()
    page.keyboard.type("arr, a comment")
    assert "/reviews/" in page.url, "letters in a field decide nothing"
    page.keyboard.press("Escape")
    curator.key("r")
    assert any(item.comment == "arr, a comment" for item in review_service.stores.reviews.decided(waiting.id))


def test_the_documentation_of_the_api_works_offline(person):
    curator = person()
    curator.page.goto("/docs")
    curator.page.get_by_text("/v1/reviews/claim").first.wait_for()
