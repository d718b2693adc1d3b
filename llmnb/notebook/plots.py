"""Figures that people explore and keep, drawn by plotly from the same curves as the live view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import series
from ..errors import MissingPackage
from ..series import Curve
from .poller import read
from .still import title_of

__all__ = ["plot"]

_BLUE, _GREY = "#1f77b4", "#7f7f7f"
_OTHERS = ("#e69f00", "#009e73", "#cc79a7", "#d55e00", "#9a8cd8")
_BUCKETS = 5000


def plot(run: Any, *, compare: Sequence[Any] = (), smooth: float = 0.6, log: bool = False) -> Any:
    """A run as a figure: loss, evaluations and checkpoints above, learning rate and gradient norm below.

    Args:
        run: a ``Run``.
        compare: other runs; their smoothed losses are drawn over it.
        smooth: the share of the past in the smoothed lines, 0 to below 1.
        log: draws the losses on a logarithmic scale.

    Returns:
        A ``plotly.graph_objects.Figure``: ``figure.show()``, ``figure.write_html("run.html")``.

    Raises:
        MissingPackage: plotly is not installed.
        ValueError: ``smooth`` is not in [0, 1).
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError:
        raise MissingPackage("plotly", "notebook", "A figure") from None
    curve, record = read(run)
    figure = make_subplots(
        rows=2,
        shared_xaxes=True,
        vertical_spacing=0.06,
        row_heights=[0.66, 0.34],
        specs=[[{}], [{"secondary_y": True}]],
    )
    _losses(figure, curve, smooth)
    for other, colour in zip(compare, _colours(len(compare)), strict=True):
        theirs, their_record = read(other)
        drawn = series.picture(theirs, weight=smooth, buckets=_BUCKETS)
        name = title_of(their_record)
        figure.add_scatter(x=drawn.steps, y=drawn.smooth, name=name, mode="lines", line={"color": colour}, row=1, col=1)
    _rates(figure, curve)
    if curve.checkpoints:
        _checkpoints(figure, curve)
    figure.update_xaxes(title_text="step", row=2, col=1)
    figure.update_yaxes(title_text="loss", type="log" if log else "linear", row=1, col=1)
    figure.update_yaxes(title_text="learning rate", rangemode="tozero", exponentformat="e", row=2, col=1)
    figure.update_yaxes(title_text="gradient norm", rangemode="tozero", showgrid=False, secondary_y=True, row=2, col=1)
    figure.update_layout(
        title=f"{title_of(record)} · {curve.state}", hovermode="x unified", template="plotly_white", height=640
    )
    return figure


def _colours(count: int) -> list[str]:
    return [_OTHERS[i % len(_OTHERS)] for i in range(count)]


def _losses(figure: Any, curve: Curve, weight: float) -> None:
    drawn = series.picture(curve, weight=weight, buckets=_BUCKETS)
    faint, strong = {"color": _BLUE, "width": 1}, {"color": _BLUE, "width": 2}
    where: dict[str, Any] = {"row": 1, "col": 1}
    figure.add_scatter(x=drawn.steps, y=drawn.loss, name="loss", mode="lines", line=faint, opacity=0.4, **where)
    figure.add_scatter(x=drawn.steps, y=drawn.smooth, name="smoothed", mode="lines", line=strong, **where)
    evaluated = drawn.evaluated
    if len(evaluated):
        look: dict[str, Any] = {"mode": "lines+markers", "line": {"color": _GREY}}
        figure.add_scatter(x=evaluated.steps, y=evaluated.values, name="eval", **look, **where)


def _rates(figure: Any, curve: Curve) -> None:
    for name, words, colour, second in (
        ("learning_rate", "learning rate", _BLUE, False),
        ("grad_norm", "gradient norm", _GREY, True),
    ):
        points = series.downsample(curve[name], _BUCKETS)
        if len(points):
            look: dict[str, Any] = {"mode": "lines", "line": {"color": colour}, "secondary_y": second}
            figure.add_scatter(x=points.steps, y=points.values, name=words, row=2, col=1, **look)


def _checkpoints(figure: Any, curve: Curve) -> None:
    """On an axis of their own along the floor of the losses, whatever the losses' scale."""
    best = series.best_checkpoint(curve)
    saved = curve.checkpoints
    figure.add_scatter(
        x=[c.step for c in saved],
        y=[0.0] * len(saved),
        yaxis="y4",
        xaxis="x",
        name="checkpoint",
        mode="markers",
        marker={"symbol": ["diamond" if c.step == best else "circle-open" for c in saved], "color": _GREY, "size": 9},
        hovertext=[" ".join(filter(None, (f"step {c.step}", "best" if c.step == best else ""))) for c in saved],
        hoverinfo="text",
        cliponaxis=False,
    )
    figure.update_layout(yaxis4={"overlaying": "y", "visible": False, "range": [0, 1], "fixedrange": True})
