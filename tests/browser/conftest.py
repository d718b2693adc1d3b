"""Fixtures of the browser tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def driver():
    """A started playwright: one for all Labs of a file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as found:
        yield found
