"""A headless Chromium of this machine for pages, since Playwright's own is not on PyPI; without one a test is skipped.

ADASCOPE_FAST_CHROMIUM names another program.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def program() -> str | None:
    """The path of Chromium or Chrome, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("ADASCOPE_FAST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextmanager
def opened(**options: Any) -> Iterator[Any]:
    """A page of a fresh browser, which fails the test for an error or a request to anywhere but this machine.

    Args:
        options: of Playwright's `new_page`, such as `viewport`.
    """
    path = program()
    if path is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(**options)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.extend(_elsewhere(request.url)))
        yield page
        browser.close()
    assert not wrong


def _elsewhere(url: str) -> list[str]:
    local = ("http://127.0.0.1:", "http://localhost:", "file://", "data:", "about:", "blob:")
    return [] if url.startswith(local) else [f"asked {url}"]
