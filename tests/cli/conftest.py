# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures, among them a page of a real browser."""

import shutil

import pytest
from evaluation import checkpoint, make_cell, private_cache  # noqa: F401

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [f"--{name}" for name in ("no-sandbox", "disable-gpu", "no-first-run", "disable-dev-shm-usage")]
FLAGS += [f"--disable-{name}" for name in ("background-networking", "component-update", "sync")]
PATIENCE = 120_000  # milliseconds; the page holds megabytes of script, and the machine may be busy


@pytest.fixture
def page():
    """A page of headless Chromium, and everything that it asked for or complained about."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=FLAGS, timeout=PATIENCE)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.events = []
        page.on("request", lambda request: page.events.append(request.url))
        page.on("console", lambda message: page.events.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: page.events.append(str(error)))
        page.on("dialog", lambda dialog: (page.events.append(dialog.message), dialog.dismiss()))
        yield page
        browser.close()
