"""Classes of senones: those with enough training frames, the others backed off to the most frequent senone of their phone.

A senone is a state of a context-dependent phone that others share (Young, Odell and Woodland, "Tree-based state tying for high
accuracy acoustic modelling", 1994). A small corpus hears most of an acoustic model's thousands too rarely to learn them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.inventory import ClassInventory

# A second and a bit at frames of 30 ms; with fewer a class is not learnt.
MIN_FRAMES = 30
# Of the CMU models: silence, noise, and speech that is no word.
SILENCES = ("SIL", "+NSN+", "+SPN+")

Senones = npt.NDArray[np.integer]
Phones = npt.NDArray[np.str_]


@dataclass(frozen=True, slots=True, kw_only=True)
class SenoneClasses:
    """``class_of``: class id by senone; ``fallback``: the most frequent class by phone, for senones that were not heard."""

    inventory: ClassInventory
    class_of: Mapping[int, int]
    fallback: Mapping[str, int]

    def labels_T(self, senones_T: Senones, phones_T: Phones) -> npt.NDArray[np.int32]:
        """Class id of each frame, int32 [T]; -1 for a senone and a phone that were not heard."""
        pairs = zip(senones_T.tolist(), phones_T.tolist(), strict=True)
        found = [self.class_of.get(senone, self.fallback.get(phone, -1)) for senone, phone in pairs]
        return np.array(found, dtype=np.int32)


def back_off(frames: Iterable[tuple[Senones, Phones]]) -> SenoneClasses:
    """Classes of the training frames, senones and phones of each utterance [T]: sorted by phone, the most frequent first."""
    counts: Counter[tuple[int, str]] = Counter()
    for senones_T, phones_T in frames:
        counts.update(zip(senones_T.tolist(), phones_T.tolist(), strict=True))
    per_senone: dict[int, Counter[str]] = defaultdict(Counter)
    for (senone, phone), count in counts.items():
        per_senone[senone][phone] += count
    phone_of = {senone: phones.most_common(1)[0][0] for senone, phones in per_senone.items()}
    total = {senone: sum(phones.values()) for senone, phones in per_senone.items()}
    by_phone: dict[str, list[int]] = defaultdict(list)
    for senone in sorted(total, key=lambda senone: (-total[senone], senone)):
        by_phone[phone_of[senone]].append(senone)
    names: list[str] = []
    phones_of_class: list[str] = []
    class_of: dict[int, int] = {}
    fallback: dict[str, int] = {}
    for phone in sorted(by_phone):
        kept = [senone for senone in by_phone[phone] if total[senone] >= MIN_FRAMES] or by_phone[phone][:1]
        fallback[phone] = len(names)
        for senone in by_phone[phone]:
            class_of[senone] = len(names) + (kept.index(senone) if senone in kept else 0)
        names += [f"{phone}/{senone}" for senone in kept]
        phones_of_class += [phone] * len(kept)
    silences = tuple(phone for phone in SILENCES if phone in by_phone)
    inventory = ClassInventory(names=tuple(names), phones=tuple(phones_of_class), silence_phones=silences)
    return SenoneClasses(inventory=inventory, class_of=class_of, fallback=fallback)
