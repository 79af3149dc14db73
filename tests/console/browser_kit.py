"""Chromium through Playwright over the real application: people, their keys, and what a page may not do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, Request, sync_playwright

CHROMIUM = "/usr/bin/chromium"
PHONE = {"width": 390, "height": 844}
PATIENCE = 120_000
"""Milliseconds that a busy machine may take for a page."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; without its sandbox, which does not start as root in a container."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Person:
    """A signed-in person; every request to another host, dialog and script error is kept in `faults`."""

    def __init__(self, browser: Browser, url: str, key: str | None, **options: Any) -> None:
        self.url = url
        self.faults: list[str] = []
        self.context: BrowserContext = browser.new_context(base_url=url, **options)
        self.context.set_default_timeout(PATIENCE)
        self.page: Page = self.context.new_page()
        self.page.on("request", self._requested)
        self.page.on("dialog", self._asked)
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("console", lambda message: message.type == "error" and self.faults.append(message.text))
        self.page.goto("/console/sign-in")
        if key is not None:
            self.page.get_by_label("API key").fill(key)
            self.page.get_by_role("button", name="Sign in").click()
        else:
            self.page.get_by_role("button", name="Continue").click()
        self.page.wait_for_url("**/console")

    def go(self, path: str) -> Page:
        """Open a page of the console."""
        self.page.goto(f"/console{path}")
        return self.page

    def key(self, key: str) -> None:
        """Press a key that submits a form, and wait for the next page."""
        with self.page.expect_navigation():
            self.page.keyboard.press(key)

    def _requested(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:", "about:")):
            self.faults.append(f"request: {request.url}")

    def _asked(self, dialog: Any) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()
