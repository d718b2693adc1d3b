"""``llmnb lab`` in a real browser: the first tutorial is open, with the curve that was saved in it."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright")
pytest.importorskip("jupyterlab")

from lab import CHROMIUM, FLAGS
from test_cli_lab import running

pytestmark = [pytest.mark.browser, pytest.mark.slow]
if CHROMIUM is None:
    pytestmark.append(pytest.mark.skip(reason="no Chromium on this machine: apt-get install chromium"))


def test_the_address_that_is_printed_shows_the_first_tutorial(tmp_path):
    from playwright.sync_api import sync_playwright

    with running(tmp_path, "--ServerApp.port=0") as (_, address), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.goto(address)
        page.wait_for_selector(".jp-Notebook h1", timeout=120_000)
        assert "Fine-tune a language model without leaving the notebook" in page.inner_text(".jp-Notebook h1")
        page.wait_for_function(
            "() => document.querySelectorAll('.jp-OutputArea img[alt^=\"training loss\"]').length > 0"
        )
        drawn = "() => document.querySelector('.jp-OutputArea img[alt^=\"training loss\"]').naturalWidth"
        assert page.evaluate(drawn) > 100, "the still survives JupyterLab's sanitiser"
        # And so do the answers. JupyterLab draws the cells below when it has nothing else to do.
        page.wait_for_function("() => document.querySelectorAll('.jp-OutputArea .llmnb-answer').length === 4")
        page.screenshot(path=str(tmp_path / "lab.png"))
        browser.close()
