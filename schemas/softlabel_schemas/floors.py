"""What each codec does not tell from 0."""

from __future__ import annotations

import math
from typing import NamedTuple

from softlabel_schemas.codec import LOG_PROB_STEP
from softlabel_schemas.codec import TAIL_LEVELS as PACKED_TAIL_LEVELS
from softlabel_schemas.mtf_kernels import LEVELS
from softlabel_schemas.mtf_sqrt import TAIL_LEVELS
from softlabel_schemas.selection import MIN_LOG_PROB
from softlabel_schemas.spec import CodecName


class Floor(NamedTuple):
    """A probability below ``below`` is stored as ``prob``, a tail mass below ``tail`` as 0."""

    prob: float
    below: float
    tail: float


# See the error bounds of ``mtf_sqrt.py`` and ``codec.py``. "packed-f32" has only the floor of capture.
FLOORS: dict[CodecName, Floor] = {
    "mtf-sqrt": Floor(
        prob=(0.25 / LEVELS) ** 2, below=(0.5 / LEVELS) ** 2, tail=math.sin(math.pi / (4 * TAIL_LEVELS)) ** 2
    ),
    "packed-u8": Floor(
        prob=math.exp(-255 * LOG_PROB_STEP),
        below=math.exp(-254.5 * LOG_PROB_STEP),
        tail=(0.5 / PACKED_TAIL_LEVELS) ** 2,
    ),
    "packed-f32": Floor(prob=math.exp(MIN_LOG_PROB), below=math.exp(MIN_LOG_PROB), tail=math.exp(MIN_LOG_PROB)),
}
