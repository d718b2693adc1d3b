"""The still picture of a run: what stays in the saved notebook when no kernel is there.

A curve becomes plain text, HTML and SVG, drawn here without any plotting package. The picture stands inside an
``<img>``, where neither a page nor a sanitiser can take it apart; its greys read on light and on dark ground. This
module knows neither database nor widgets.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..series import Curve, Floats, Picture, best_checkpoint, marks, picture
from .tables import local_time
from .words import Status, figure, number, status

__all__ = ["bundle", "kept", "page", "svg", "text", "title_of"]

WIDTH, HEIGHT = 1000, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 28
_ACCENT, _GREY, _FAINT = "#2196f3", "#888888", "#88888844"
_BARS = "▁▂▃▄▅▆▇█"


def title_of(record: Mapping[str, Any]) -> str:
    """What a person calls the run: its model and when it was started."""
    version = f" v{record['version']}" if record.get("version") else ""
    name = str(record.get("model") or record.get("identifier") or record.get("_id", "run"))
    return " · ".join(part for part in (name + version, local_time(record.get("created"))) if part)


def kept(inner: str) -> str:
    """What a saved file shows in place of the widget in the output before it, which lives only as long as its kernel.

    A view that lives hides this; without one, this hides the message that there is none.
    """
    alive = ":has(.llmnb-live, .llmnb-panel, .llmnb-picker-box, .llmnb-chat)"
    before = f".jp-OutputArea-child:has(+ .jp-OutputArea-child .llmnb-kept):not({alive})"
    return f'<style>{before} {{ display: none }}</style><div class="llmnb-kept">{inner}</div>'


def bundle(curve: Curve, title: str, now: float, *, small: bool = False) -> dict[str, str]:
    """The MIME bundle of a still: ``text/plain``, ``text/html`` and, when something was logged, ``image/svg+xml``.

    ``small``: for a picture that the next one replaces: coarser, and without the second form of the image.
    """
    words = status(curve, now)
    picture = svg(curve, 150 if small else 400) if curve.points or len(curve["eval_loss"]) else ""
    out = {"text/plain": text(curve, title, words), "text/html": page(curve, title, words, picture)}
    if picture and not small:
        out["image/svg+xml"] = picture
    return out


def text(curve: Curve, title: str, words: Status) -> str:
    """A few lines and a row of bars."""
    lines = [" · ".join(part for part in (title, words.state, words.step) if part), _facts(words)]
    values = picture(curve).smooth
    values = values[np.isfinite(values)]
    if len(values) > 1:
        chosen = values[np.linspace(0, len(values) - 1, min(60, len(values))).astype(int)]
        low, high = float(chosen.min()), float(chosen.max())
        scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
        bars = "".join(_BARS[round((float(v) - low) * scale)] for v in chosen)
        lines.append(f"loss {figure(float(chosen[0]))} {bars} {figure(float(chosen[-1]))}")
    lines.append("checkpoints: " + "; ".join(words.checkpoints) if words.checkpoints else "")
    lines.append(words.alert)
    return "\n".join(line for line in lines if line)


def _facts(words: Status) -> str:
    return "   ".join(f"{label} {value}".strip() for label, value in words.facts)


def page(curve: Curve, title: str, words: Status, picture: str) -> str:
    """The same as HTML, with the picture. Everything that came from outside is escaped."""
    esc = html.escape
    font = "font-family:var(--jp-ui-font-family,var(--vscode-font-family,sans-serif));font-variant-numeric:tabular-nums"
    parts = [
        f'<div class="llmnb-words" data-run="{esc(curve.run)}" data-status="{esc(words.state)}" '
        f'data-points="{words.points}" style="{font}">',
        f"<div><b>{esc(title)}</b> &nbsp; {esc(words.state)} &nbsp; {esc(words.step)}</div>",
    ]
    if words.alert:
        parts.append(f'<div role="alert" style="color:var(--jp-error-color1,#d32f2f)">{esc(words.alert)}</div>')
    if picture:
        parts.append(_keys(curve))
        data = base64.b64encode(picture.encode()).decode()
        alt = f"training loss by step: {_facts(words)}"
        parts.append(
            f'<img alt="{esc(alt)}" src="data:image/svg+xml;base64,{data}" '
            f'style="width:100%;max-width:{WIDTH}px;display:block">'
        )
    if words.facts:
        parts.append(f"<div>{' &nbsp; '.join(esc(f'{a} {b}'.strip()) for a, b in words.facts)}</div>")
    if words.checkpoints:
        listed = " &nbsp; ".join(f'<span style="white-space:nowrap">{esc(c)}</span>' for c in words.checkpoints[:4])
        parts.append(f'<div style="opacity:.75">checkpoints &nbsp; {listed}</div>')
    return "".join([*parts, "</div>"])


def _keys(curve: Curve) -> str:
    words = ["faint: loss", "strong: smoothed"]
    if len(curve["eval_loss"]):
        words.append("points: eval")
    if curve.checkpoints:
        words.append("○ checkpoint")
    if best_checkpoint(curve) is not None:
        words.append("◆ best")
    return f'<div style="opacity:.75">{" &nbsp; ".join(words)}</div>'


def svg(curve: Curve, buckets: int = 400) -> str:
    """The chart: loss faint, smoothed loss strong, evaluations as points, checkpoints on the axis."""
    drawn = picture(curve, buckets=buckets)
    high_x = max([1.0, *drawn.steps[-1:], *drawn.evaluated.steps[-1:]])
    low, high = _range(drawn)

    def x(step: Floats | float) -> Floats | float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / high_x

    def y(value: Floats | float) -> Floats | float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="none">'
    ]
    floor = HEIGHT - BOTTOM
    for mark in marks(low, high, 6):
        parts.append(f'<path d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}" stroke="{_FAINT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end" fill="{_GREY}">{mark:g}</text>')
    for mark in marks(0, high_x, 10):
        if mark == int(mark):
            at = f'x="{x(mark):.1f}" y="{floor + 19}" text-anchor="middle"'
            parts.append(f'<text {at} fill="{_GREY}">{number(mark)}</text>')
    parts.append(_path(x(drawn.steps), y(drawn.loss), f'stroke="{_ACCENT}" stroke-opacity=".5"'))
    parts.append(_path(x(drawn.steps), y(drawn.smooth), f'stroke="{_ACCENT}" stroke-width="2"'))
    evaluated = drawn.evaluated
    parts.append(_path(x(evaluated.steps), y(evaluated.values), f'stroke="{_GREY}"'))
    for step, value in zip(evaluated.steps, evaluated.values, strict=True):
        if math.isfinite(value):
            parts.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{_GREY}"/>')
    chosen = best_checkpoint(curve)
    for saved in curve.checkpoints:
        cx = f"{x(float(saved.step)):.1f}"
        if saved.step == chosen:
            parts.append(f'<path d="M{cx} {floor - 5}l5 5l-5 5l-5 -5Z" fill="{_GREY}"/>')
        else:
            parts.append(f'<circle cx="{cx}" cy="{floor}" r="3.5" stroke="{_GREY}" stroke-width="1.5"/>')
    return "".join([*parts, "</svg>"])


def _range(drawn: Picture) -> tuple[float, float]:
    values = np.concatenate([drawn.loss, drawn.evaluated.values])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    air = (high - low or abs(high) or 1.0) * 0.08
    return (0.0 if low >= 0 > low - air else low - air), high + air


def _path(xs: Floats | float, ys: Floats | float, look: str) -> str:
    """A line with a gap at every value that is not finite. A point between two gaps is drawn as a dot."""
    pieces: list[str] = []
    pen = False
    xs, ys = np.atleast_1d(xs), np.atleast_1d(ys)
    for i, (px, py) in enumerate(zip(xs, ys, strict=True)):
        if not math.isfinite(py):
            pen = False
            continue
        alone = not pen and (i + 1 == len(ys) or not math.isfinite(ys[i + 1]))
        pieces.append(f"{'L' if pen else 'M'}{px:.1f} {py:.1f}" + ("h.1" if alone else ""))
        pen = True
    return f'<path d="{"".join(pieces)}" {look} stroke-linejoin="round" stroke-linecap="round"/>' if pieces else ""
