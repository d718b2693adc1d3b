"""Figures that people explore and keep, drawn by plotly from the same curves as the live view."""

from __future__ import annotations

from typing import Any

from .. import series
from ..errors import MissingPackage
from .poller import read
from .still import title_of

__all__ = ["plot"]


def plot(run: Any, *, weight: float = 0.6) -> Any:
    """The loss of a run: raw, smoothed, evaluations, checkpoints.

    Args:
        run: a ``Run``.
        weight: the share of the past in the smoothed line, 0 to below 1.

    Returns:
        A ``plotly.graph_objects.Figure``.

    Raises:
        MissingPackage: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MissingPackage("plotly", "notebook", "A figure") from None
    curve, record = read(run)
    drawn = series.picture(curve, weight=weight, buckets=5000)
    figure = go.Figure()
    blue, grey = "#1f77b4", "#7f7f7f"
    faint = {"color": blue, "width": 1}
    figure.add_scatter(x=drawn.steps, y=drawn.loss, name="loss", mode="lines", line=faint, opacity=0.4)
    figure.add_scatter(x=drawn.steps, y=drawn.smooth, name="smoothed", mode="lines", line={"color": blue, "width": 2})
    if len(drawn.evaluated):
        evaluated = drawn.evaluated
        figure.add_scatter(
            x=evaluated.steps, y=evaluated.values, name="eval", mode="lines+markers", line={"color": grey}
        )
    if curve.checkpoints:
        best = series.best_checkpoint(curve)
        floor = [0.0] * len(curve.checkpoints)
        figure.add_scatter(
            x=[c.step for c in curve.checkpoints],
            y=floor,
            yaxis="y2",
            name="checkpoint",
            mode="markers",
            marker={
                "symbol": ["diamond" if c.step == best else "circle-open" for c in curve.checkpoints],
                "color": grey,
                "size": 9,
            },
            hovertext=[
                " ".join(filter(None, (f"step {c.step}", "best" if c.step == best else ""))) for c in curve.checkpoints
            ],
            hoverinfo="text",
        )
    figure.update_layout(
        title=f"{title_of(record)} · {curve.state}",
        xaxis_title="step",
        yaxis_title="loss",
        yaxis2={"overlaying": "y", "visible": False, "range": [0, 1], "fixedrange": True},
        hovermode="x unified",
        template="plotly_white",
    )
    return figure
