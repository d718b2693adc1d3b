"""Other libraries' remarks while a model is loaded."""

from __future__ import annotations

import io
import logging
import warnings

from llmnb.engine import quiet
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


def test_afterwards_all_is_as_it_was(monkeypatch):
    # A logger of this test's own: what other libraries left on theirs in this process is not asked here.
    logger, heard = logging.getLogger("llmnb-test-loud"), io.StringIO()
    handler = logging.StreamHandler(heard)
    monkeypatch.setattr(quiet, "_LOUD", (logger.name,))
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    before = (logger.level, list(logger.filters), list(warnings.filters))
    try:
        with hushed():
            logger.warning("not heard")
            raise ValueError("loading failed")
    except ValueError:
        pass
    finally:
        logger.warning("heard again")
        logger.removeHandler(handler)
    assert (logger.level, list(logger.filters), list(warnings.filters)) == before
    assert heard.getvalue() == "heard again\n"
