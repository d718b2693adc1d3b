"""Events to curves: the reducer, smoothing, downsampling."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import series
from llmnb.events import CheckpointSaved, Metric, Note, StateChanged
from llmnb.series import Curve, Points


def losses(values, *, start=1, every=1, seconds=1.0, seq=1, name="loss"):
    return [
        Metric(seq=seq + i, time=1000.0 + seconds * i, step=start + every * i, values={name: v})
        for i, v in enumerate(values)
    ]


def test_folding_in_pieces_equals_folding_at_once():
    events = [
        StateChanged(seq=1, time=1, state="running"),
        *losses([3.0, 2.5, 2.0], seq=2),
        CheckpointSaved(seq=5, step=3, digest="d", size=9, metrics={"eval_loss": 2.1}, best=True),
        Metric(seq=6, step=3, values={"eval_loss": 2.1}),
        Note(seq=7, text="12 rows were cut"),
        StateChanged(seq=8, state="done"),
    ]
    whole = series.fold(Curve(), events)
    pieces = Curve()
    for event in events:
        pieces = series.fold(pieces, [event])
    for curve in (whole, pieces):
        assert curve.seq == 8 and curve.state == "done" and curve.ended and curve.step == 3 and curve.points == 3
        assert curve["loss"].values.tolist() == [3.0, 2.5, 2.0] and curve["loss"].steps.tolist() == [1, 2, 3]
        assert [c.step for c in curve.checkpoints] == [3] and curve.notes[0].text == "12 rows were cut"
        assert series.best(curve) == (3, 2.1)


def test_an_event_sent_twice_counts_once_and_order_does_not_matter():
    events = losses([3.0, 2.0, 1.0])
    curve = series.fold(Curve(), [events[2], events[0], events[1], events[1]])
    assert curve["loss"].values.tolist() == [3.0, 2.0, 1.0]
    assert series.fold(curve, events) is curve


def test_folding_changes_nothing_it_was_given():
    first = series.fold(Curve(), losses([3.0, 2.0]))
    before = first["loss"].values.copy()
    series.fold(first, losses([9.0], start=2, seq=3))
    assert first["loss"].values.tolist() == before.tolist() and first.seq == 2


def test_what_has_grown_leaves_what_it_grew_from_alone():
    first = Points(*(np.array([1.0, 2.0]) for _ in range(3)))
    grown = first.extended([3], [9.0], [3])
    one, other = grown.extended([4], [1.0], [4]), grown.extended([4], [2.0], [4])
    assert one.values.tolist() == [1, 2, 9, 1] and other.values.tolist() == [1, 2, 9, 2]
    assert grown.values.tolist() == [1, 2, 9] and first.values.tolist() == [1, 2]
    back = one.extended([2], [5.0], [5])
    assert back.values.tolist() == [1, 5] and one.values.tolist() == [1, 2, 9, 1]


def test_growing_a_long_series_costs_what_is_new():
    count = 1_000_000
    points = Points(*(np.arange(count, dtype=float) for _ in range(3))).extended([count], [1.0], [1.0])
    begin = time.process_time()
    for step in range(count + 1, count + 1001):
        points = points.extended([step], [1.0], [1.0])
    assert time.process_time() - begin < 1.0 and len(points) == count + 1001


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["loss", "eval_loss", "both"])), max_size=40),
    st.integers(0, 40),
)
def test_metrics_taken_as_columns_give_the_curve_that_folding_gives(said, cut):
    """Also when a run went back, once or often, before or within the columns."""
    names = {"both": ("loss", "eval_loss")}
    events = [
        Metric(seq=i, time=1000.0 + i, step=step, epoch=i / 2, values={n: i / 3 for n in names.get(name, (name,))})
        for i, (step, name) in enumerate(said, 1)
    ]
    before, rest = series.fold(Curve(), events[:cut]), events[cut:]
    columns = series.Columns(
        np.array([e.seq for e in rest], dtype=np.int64),
        np.array([e.step for e in rest], dtype=float),
        np.array([e.time for e in rest]),
        {n: np.array([e.values.get(n, math.nan) for e in rest]) for n in ("loss", "eval_loss")},
        {n: np.array([n in e.values for e in rest], dtype=bool) for n in ("loss", "eval_loss")},
        rest[-1].epoch if rest else None,
    )
    folded, taken = series.fold(before, rest), series.taken(before, columns)
    assert (taken.seq, taken.step, taken.epoch, taken.times) == (folded.seq, folded.step, folded.epoch, folded.times)
    for name in ("loss", "eval_loss"):
        for part in ("steps", "values", "times"):
            assert getattr(taken[name], part).tolist() == getattr(folded[name], part).tolist()


@given(st.lists(st.floats(-5, 5) | st.just(math.nan), max_size=60), st.integers(0, 60), st.floats(0, 0.99))
def test_smoothing_in_pieces_is_smoothing_at_once(values, cut, weight):
    whole = series.smooth(np.array(values), weight)
    first, average = series.Average(weight).over(np.array(values[:cut]))
    second, _ = average.over(np.array(values[cut:]))
    assert np.allclose(np.concatenate([first, second]), whole, equal_nan=True)


def test_a_resumed_run_takes_every_series_back():
    curve = series.fold(Curve(), [*losses([5, 4, 3, 2]), Metric(seq=5, step=4, values={"eval_loss": 2.2})])
    curve = series.fold(curve, losses([3.5, 2.5], start=3, seq=6))
    assert curve["loss"].steps.tolist() == [1, 2, 3, 4] and curve["loss"].values.tolist() == [5, 4, 3.5, 2.5]
    assert len(curve["eval_loss"]) == 0 and curve.step == 4


def test_only_one_checkpoint_is_the_best():
    saved = [CheckpointSaved(seq=i, step=10 * i, digest=str(i), best=True) for i in (1, 2, 3)]
    assert [c.best for c in series.fold(Curve(), saved).checkpoints] == [False, False, True]


def test_the_record_is_the_truth_about_the_state():
    curve = series.fold(Curve(), [StateChanged(seq=1, state="running"), *losses([1.0], seq=2)])
    record = {"_id": "r", "state": "lost", "counts": {"steps": 40}, "error": {"what": "No sign of life.", "todo": None}}
    curve = series.told(curve, record)
    assert (curve.run, curve.state, curve.reason, curve.total) == ("r", "lost", "No sign of life.", 40)
    assert series.told(curve, {"_id": "r", "state": "running"}).total == 40


# --- trap 10: 0, NaN and Inf survive ---------------------------------------------------------------------------


def test_trap10_zero_nan_and_inf_survive_and_the_step_is_named():
    curve = series.fold(Curve(), losses([1.0, 0.0, math.nan, math.inf, math.nan]))
    values = curve["loss"].values
    assert values[1] == 0.0 and math.isnan(values[2]) and math.isinf(values[3])
    assert series.broke(curve) == 3
    healed = series.fold(curve, losses([0.5], start=6, seq=6))
    assert series.broke(healed) is None


def test_trap10_a_gap_stays_a_gap_when_downsampled_and_smoothed():
    values = np.ones(50_000)
    values[20_000] = np.nan
    values[33_333] = np.inf
    values[41_000] = 99.0
    steps = np.arange(50_000.0)
    small = series.downsample(Points(steps, values, steps), 500)
    assert len(small) <= 2 * 500 + 10
    assert 20_000 in small.steps and 33_333 in small.steps
    assert small.values[small.steps == 41_000] == [99.0], "a spike is kept"
    smoothed = series.smooth(values, 0.9)
    assert np.flatnonzero(~np.isfinite(smoothed)).tolist() == [20_000, 33_333]
    assert np.allclose(smoothed[20_001:33_333], 1.0), "a gap leaves no trace in its neighbours"


# --- smoothing and downsampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.05, 0.6, 0.9, 0.999])
def test_smoothing_is_the_plain_recursion_without_bias(weight):
    values = np.random.default_rng(1).normal(3, 1, 3000)
    mean, expected = 0.0, []
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        expected.append(mean / (1 - weight**i))
    assert np.allclose(series.smooth(values, weight), expected, rtol=1e-9)


@pytest.mark.parametrize("weight", [-0.1, 1.0, 2])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match="smoothing weight"):
        series.smooth(np.ones(3), weight)


def test_smoothing_nothing_and_only_nan():
    assert len(series.smooth(np.empty(0))) == 0
    assert np.isnan(series.smooth(np.array([np.nan, np.nan]))).all()


@pytest.mark.parametrize("count", [0, 1, 7, 19, 20, 21, 39, 40, 1001, 99_999])
def test_downsampling_keeps_ends_and_extremes(count):
    rng = np.random.default_rng(count)
    values, steps = rng.normal(0, 1, count), np.arange(count, dtype=float)
    small = series.downsample(Points(steps, values, steps), 10)
    assert len(small) <= max(2 * 10 + 4, 0) or len(small) == count <= 20
    assert (np.diff(small.steps) > 0).all()
    if count:
        assert small.steps[0] == 0 and small.steps[-1] == count - 1
        assert small.values.min() == values.min() and small.values.max() == values.max()


def test_downsampling_with_an_all_nan_bucket_and_a_nan_tail():
    values = np.ones(1003)
    values[:200] = np.nan
    values[1001] = np.nan
    steps = np.arange(1003.0)
    small = series.downsample(Points(steps, values, steps), 10)
    assert np.isnan(small.values[small.steps == 1001]).all() and np.isnan(small.values[0])
    assert (small.values[np.isfinite(small.values)] == 1).all()


def test_downsampling_needs_a_bucket():
    with pytest.raises(ValueError, match="at least one bucket"):
        series.downsample(Points(), 0)


def test_a_hundred_thousand_points_are_fast():
    steps = np.arange(100_000.0)
    points = Points(steps, np.sin(steps), steps)
    start = time.perf_counter()
    series.downsample(points, 1000)
    series.smooth(points.values, 0.6)
    assert time.perf_counter() - start < 0.5  # measured 5 ms; a loop in Python takes longer on a busy machine


def test_a_range_reaches_its_edges():
    steps = np.arange(0.0, 100, 10)
    part = Points(steps, steps, steps).between(25, 45)
    assert part.steps.tolist() == [20, 30, 40, 50]


def test_speed_from_tokens_when_the_run_says_no_speed():
    events = [Metric(seq=i, time=100.0 + i, step=i, values={"tokens": 500.0 * i}) for i in (1, 2, 3)]
    assert series.rate(series.fold(Curve(), events)) == pytest.approx(500)
    assert series.rate(series.fold(Curve(), events[:1])) is None


def test_marks_are_round_and_inside():
    assert series.marks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert series.marks(1.83, 2.41, 4) == [2.0, 2.2, 2.4]
    assert series.marks(1, 1) == [] and series.marks(math.nan, 2) == []
