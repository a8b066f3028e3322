"""A browser for the tests of the Space: Debian's Chromium, driven by playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from tests.support.space_runs import PATIENCE_S

NEEDED = "RESMERGE_NEEDS_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """The path of an installed Chromium.

    Where there is none, the calling test is skipped; with RESMERGE_NEEDS_BROWSER set, it fails.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is not None:
        return found
    if os.environ.get(NEEDED):
        pytest.fail(f"{NEEDED} is set, but there is no Chromium", pytrace=False)
    # A laptop without a browser runs the rest and is told; `.ci/run` sets NEEDED and never skips.
    pytest.skip("no Chromium here: apt-get install chromium (.ci/run does)")


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser without a window; nothing outside this machine is reachable from it."""
    path = chromium()
    expect.set_options(timeout=PATIENCE_S * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def visitor(browser: Browser, **options: object) -> BrowserContext:
    """Somebody with cookies and storage of their own, who loads nothing from elsewhere."""
    context = browser.new_context(**options)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE_S * 1000)
    context.route(lambda url: "//127.0.0.1:" not in url, lambda route: route.abort())
    return context
