"""Which temperatures a lossy codec can tell: the others are refused, not approximated.

A lossy codec stores whatever is too small to tell from 0 as one small probability, its floor. At temperature 1 that is
little: the floor of "mtf-sqrt" is 1.7e-6. But it adds up where all classes are stored: narrowed to fewer, a frame whose
likeliest class has all has a tail of 0.0010 with 638 classes, 0.0051 with 3,000, 0.015 with 9,000 and 0.054 with 32,000, and
a sample meets such classes as often. From 0.01 on that is warned of; "packed-u8" stays below. At temperature tau it weighs
1.7e-6^(1/tau) beside Z_tau, which is at least 1: 0.0013 at 2, 0.036 at 4. Six hundred such entries of a frame, of next to no
probability, would then outweigh the class that has nearly all of it. How many there may be in a frame, the selection says: an
entry that a mass or a threshold asks for is never so small.
"""

from __future__ import annotations

import click

from softlabel_schemas.errors import InputError
from softlabel_schemas.floors import FLOORS, Floor
from softlabel_schemas.selection import AnySelection, Mass, Threshold, max_entries_per_frame
from softlabel_schemas.spec import CodecName, DatasetSpec

# How far entries at the floor may move a posterior: at most by this share of it, and by that only where one class has all.
_MAX_WEIGHT = 0.1
# Of a frame's mass at temperature 1: 5,899 entries of "mtf-sqrt".
_WARNED_MASS = 0.01


def obstacle(selection: AnySelection, codec: CodecName, temperature: float, num_classes: int) -> str | None:
    """Why the posterior at ``temperature`` cannot be told from what is stored; None: it can."""
    if temperature == 1 or codec == "packed-f32":
        return None
    floor = FLOORS[codec]
    num_entries = _num_at_floor(selection, floor, num_classes)
    weight = floor.prob ** (1 / temperature)
    if num_entries * weight <= _MAX_WEIGHT:
        return None
    return (
        f"codec '{codec}' stores every probability below {floor.below:.1e} as {floor.prob:.1e}; at temperature {temperature:g} "
        f"{num_entries} such entries of a frame would weigh {weight:.2g} each, however small they were"
    )


def check_tempered(spec: DatasetSpec, temperature: float, *, where: str) -> None:
    """Raises InputError where ``temperature`` cannot be told from the labels of a dataset of ``spec``."""
    found = obstacle(spec.selection, spec.codec, temperature, spec.num_classes)
    if found is not None:
        raise InputError(
            f"{where}: temperature {temperature:g} is asked for, but {found}; use temperature 1, or label with "
            'targets.codec = "packed-f32" or with a narrower selection'
        )


def warn_of_floor(spec: DatasetSpec, *, where: str) -> None:
    """One line on stderr where the entries at the floor may be 0.01 of a frame's mass or more."""
    floor = FLOORS[spec.codec]
    num_entries = _num_at_floor(spec.selection, floor, spec.num_classes)
    if num_entries * floor.prob >= _WARNED_MASS:
        click.echo(
            f"warning: {where}: codec '{spec.codec}' stores every probability below {floor.below:.1e} as {floor.prob:.1e}; "
            f"{num_entries:,} such entries of a frame add up to {num_entries * floor.prob:.2g}, which is in the tail "
            'where fewer are read, and in what a sample is drawn from; label with targets.codec = "packed-u8" or "packed-f32"',
            err=True,
        )


def _num_at_floor(selection: AnySelection, floor: Floor, num_classes: int) -> int:
    """Of a frame's entries, how many may be at the floor; the likeliest class never is."""
    if isinstance(selection, Mass):
        # Before each entry less than the mass was kept, so that it, the likeliest of the rest, has its share of the rest.
        smallest = (1 - selection.mass) / num_classes
    elif isinstance(selection, Threshold):
        smallest = selection.min_prob
    else:
        smallest = 0.0
    if smallest >= floor.below:
        return int(selection.keep_hard_label)
    return max_entries_per_frame(selection, num_classes) - 1
