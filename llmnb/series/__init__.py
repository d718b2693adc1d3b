"""Events of a run, folded into series that can be drawn.

``fold(curve, events)`` is a pure function: the same events give the same ``Curve``, in one go or piece by piece,
whether the run is live or long over; ``taken`` does the same for many metrics at once. Around it: smoothing,
downsampling that keeps spikes and gaps, the best step, the pace. This room knows no database, no notebook and no chart.

    points    one series, which grows at the price of what is new
    curve     events -> everything a view shows
    drawing   smooth, small enough for a screen
    reading   a curve in figures
"""

from .curve import DRAWN, ENDED, Columns, Curve, fold, joined, taken, told
from .drawing import Average, Picture, downsample, kept, marks, picture, smooth
from .points import Floats, Points
from .reading import best, best_checkpoint, broke, rate, seconds_left

__all__ = [
    "DRAWN",
    "ENDED",
    "Average",
    "Columns",
    "Curve",
    "Floats",
    "Picture",
    "Points",
    "best",
    "best_checkpoint",
    "broke",
    "downsample",
    "fold",
    "joined",
    "kept",
    "marks",
    "picture",
    "rate",
    "seconds_left",
    "smooth",
    "taken",
    "told",
]
