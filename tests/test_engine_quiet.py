"""Other libraries' remarks while a model is loaded."""

from __future__ import annotations

import logging
import warnings

from llmnb.engine.quiet import hushed


def test_remarks_are_kept_away_and_errors_are_not(caplog):
    late = logging.getLogger("transformers")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with hushed():
            logging.getLogger("bitsandbytes.backends.cpu.ops").warning("no kernels")
            late.setLevel(logging.WARNING)  # as it does when it is imported
            late.warning("deprecated")
            logging.getLogger("peft").error("broken")
            warnings.warn("old", FutureWarning, stacklevel=1)
            warnings.warn("yours", UserWarning, stacklevel=1)
    assert [record.message for record in caplog.records] == ["broken"]
    assert [str(w.message) for w in seen] == ["yours"]


def test_afterwards_all_is_as_it_was(caplog, monkeypatch):
    logger = logging.getLogger("peft")
    for name, value in (("disabled", False), ("propagate", True), ("level", logging.WARNING)):
        monkeypatch.setattr(logger, name, value)  # whatever a library did to it in a test before
    logger.manager._clear_cache()
    before = (logger.level, list(logger.filters), list(warnings.filters))
    try:
        with hushed():
            raise ValueError("loading failed")
    except ValueError:
        pass
    assert (logger.level, list(logger.filters), list(warnings.filters)) == before
    logger.warning("heard again")
    assert "heard again" in caplog.text
