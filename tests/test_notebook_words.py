"""A run in words: times, figures, facts, and what is never promised."""

from __future__ import annotations

import math

import pytest
from test_series import losses

from llmnb import series
from llmnb.events import CheckpointSaved, Metric
from llmnb.notebook import words
from llmnb.series import Curve


def test_trap10_a_run_that_broke_says_where_and_why():
    curve = series.fold(Curve(), losses([1.0, 0.0, math.nan, math.inf, math.nan]))
    said = words.status(curve, now=1005.0)
    assert "not a number since step 3" in said.alert and "learning rate" in said.alert
    assert ("loss", "NaN") in said.facts
    healed = series.fold(curve, losses([0.5], start=6, seq=6))
    assert words.status(healed, 1006.0).alert == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "a few seconds"),
        (12, "about 10 s"),
        (57, "about 1 min"),
        (170, "about 3 min"),
        (3570, "about 1 h"),
        (7800, "about 2 h 10 min"),
        (90_000, "about 1 d 1 h"),
    ],
)
def test_times_are_said_as_people_say_them(seconds, text):
    assert words.about(seconds) == text


def test_the_time_left_follows_the_newest_pace():
    curve = series.told(
        series.fold(Curve(), losses([1.0] * 21, seconds=2.0)), {"state": "running", "counts": {"steps": 111}}
    )
    assert series.seconds_left(curve, now=1040.0) == pytest.approx(180)
    assert series.seconds_left(curve, now=1041.0) == pytest.approx(179)
    assert series.seconds_left(curve, now=1100.0) == pytest.approx(178), "nothing came: nothing is promised for it"
    said = words.status(curve, now=1040.0)
    assert said.left == "about 3 min left" and said.share == pytest.approx(21 / 111) and said.step == "step 21 / 111"


def test_no_time_is_promised_without_grounds():
    running = {"state": "running", "counts": {"steps": 50}}
    assert words.status(series.told(Curve(), running), 0).left == ""
    assert words.status(series.told(series.fold(Curve(), losses([1.0])), running), 0).left == ""
    assert words.status(series.fold(Curve(), losses([1.0, 2.0])), 0).left == "", "the end is not known"
    ended = series.told(series.fold(Curve(), losses([1.0, 2.0])), {**running, "state": "stopped"})
    assert words.status(ended, 0).left == ""


def test_facts_and_checkpoints_in_words():
    curve = series.fold(
        Curve(),
        [
            Metric(seq=1, step=300, values={"loss": 1.9, "tokens_per_second": 1720.4, "memory": 6.02e9}),
            Metric(seq=2, step=300, values={"eval_loss": 1.9}),
            CheckpointSaved(seq=3, step=300, digest="a", size=18_000_000, metrics={"eval_loss": 1.9}, best=True),
            Metric(seq=4, step=1400, values={"loss": 1.83, "tokens_per_second": 1720.4, "memory": 6.02e9}),
            Metric(seq=5, step=1400, values={"eval_loss": 1.91}),
            CheckpointSaved(seq=6, step=1400, digest="b", size=18_000_000, metrics={"eval_loss": 1.91}),
        ],
    )
    said = words.status(curve, 0)
    assert said.facts == (
        ("loss", "1.830"),
        ("eval", "1.910 (best 1.900 at 300)"),
        ("", "1\u202f720 tokens/s"),
        ("", "6.0 GB"),
    )
    assert said.checkpoints == ("step 1\u202f400  eval 1.910  18 MB", "step 300  eval 1.900  18 MB  best")
    assert said.share is None and said.step == "step 1\u202f400"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.8349, "1.835"),
        (0.0, "0.000"),
        (0.00001234, "1.234e-05"),
        (math.nan, "NaN"),
        (-math.inf, "-Inf"),
        (12345.6, "12\u202f346"),
        (3.2e7, "3.2e+07"),
        (None, "–"),
    ],
)
def test_figures(value, text):
    assert words.figure(value) == text


def test_an_empty_curve_has_words_too():
    said = words.status(Curve(), 0)
    assert (said.state, said.step, said.share, said.left, said.facts, said.alert) == (
        "queued",
        "step 0",
        None,
        "",
        (),
        "",
    )
    assert series.best(Curve()) is None and series.broke(Curve()) is None
