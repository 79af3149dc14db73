"""The ten steps of docs/console.md, on what `make console` starts, in Chromium."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from console.browser_kit import CHROMIUM, Person, chromium

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.servers,
    pytest.mark.skipif(not os.access(CHROMIUM, os.X_OK), reason="chromium is not installed (apt-get install chromium)"),
]


@pytest.fixture
def demonstration(tmp_path):
    """The command of `make console` with a free port; its address once it answers, and what it left when stopped."""
    recipe = re.search(r"^console:.*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert recipe.split()[1:3] == ["serve", "--state"]
    assert recipe.split()[4:] == ["--demo"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["serve", "--state", str(tmp_path / "state"), "--demo", "--port", str(port)]
    reft_ray = Path(sys.executable).parent / "reft-ray"
    process = subprocess.Popen([reft_ray, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 300
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=60).is_success:
                break
        except httpx.TransportError:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, "nothing answers"
            time.sleep(0.1)
    yield url
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert f"{url}/console" in output
    assert errors == ""


def test_the_ten_steps_of_a_newcomer(demonstration):
    with chromium() as browser:
        operator = Person(browser, demonstration, None)
        page = operator.page
        waiting = page.get_by_role("listitem").filter(has_text=re.compile(r"^\s*10\s*rows wait"))
        until = time.monotonic() + 300
        while not waiting.count():  # the job is being screened
            assert time.monotonic() < until, page.locator("main").inner_text()
            page.wait_for_timeout(200)
            page.reload()
        with page.expect_navigation():
            page.get_by_role("button", name="Begin").click()
        together = 0
        while "/reviews/" in page.url:
            assert page.locator("#text").evaluate("node => node.classList.contains('hidden')")
            page.keyboard.press("v")
            text = page.locator("#text")
            assert not text.evaluate("node => node.classList.contains('hidden')")
            if page.locator("input[name=duplicates]").count():
                page.keyboard.press("d")
                together += 1
            operator.key("r" if "bomb" in text.inner_text() else "a")
        assert together, "near-duplicates were decided together"
        assert "Nothing here." in page.locator("main").inner_text()
        operator.go("/jobs")
        page.get_by_role("link", name="ftjob-").click()
        page.locator("polyline.training").wait_for()
        assert "7 approved and 3 rejected by people" in page.locator("main").inner_text()
        assert page.get_by_role("link", name="screening_report.jsonl").count() == 1
        operator.go("/audit")
        page.get_by_text("Verify the chain").click()
        page.get_by_text("none changed").wait_for()
        assert page.locator("main").inner_text().count("review.") >= 10
        assert operator.faults == []
        operator.context.close()
