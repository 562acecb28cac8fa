"""Posteriors of phones, summed from those of classes: what a decoding graph takes.

Shape suffixes: T frames, V classes, C phones, E kept entries of all frames together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.targets import SoftTargets

# A phone without any stored probability is unlikely, not impossible: one wrong frame must not rule out every sentence.
_FLOOR = 1e-8


@dataclass(frozen=True, slots=True, eq=False)
class PhoneColumns:
    """Which phone each class counts for.

    Attributes:
        phones: names [C]; all silence phones are one, the last.
        silence: the name of that last one; None where the inventory has no silence phones.
        column_of_class_V: position in ``phones`` of each class, int64 [V].
    """

    phones: tuple[str, ...]
    silence: str | None
    column_of_class_V: npt.NDArray[np.int64]

    @classmethod
    def of(cls, inventory: ClassInventory) -> PhoneColumns:
        """Raises InputError where the inventory names no phones."""
        names, phone_of_class_V = inventory.phone_ids()
        spoken = tuple(name for name in names if name not in inventory.silence_phones)
        columns = {name: column for column, name in enumerate(spoken)}
        columns_V = np.array([columns.get(name, len(spoken)) for name in names], dtype=np.int64)[phone_of_class_V]
        silence = inventory.silence_phones[0] if inventory.silence_phones else None
        return cls(spoken if silence is None else (*spoken, silence), silence, columns_V)

    @property
    def spoken(self) -> tuple[str, ...]:
        """Without silence."""
        return self.phones if self.silence is None else self.phones[:-1]

    def count(self, classes_N: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """How many of these classes are of each phone, int64 [C]."""
        return np.bincount(self.column_of_class_V[classes_N], minlength=len(self.phones))

    def of_model(self, log_probs_TV: torch.Tensor) -> npt.NDArray[np.float32]:
        """Log-probabilities of phones, float32 [T, C], of a model's log-probabilities of classes [T, V]."""
        device = log_probs_TV.device
        probs_TC = torch.zeros(len(log_probs_TV), len(self.phones), device=device)
        probs_TC.index_add_(1, torch.from_numpy(self.column_of_class_V).to(device), log_probs_TV.exp())
        return np.asarray(probs_TC.clamp(min=_FLOOR).log().cpu().numpy(), dtype=np.float32)

    def of_stored(self, targets: SoftTargets) -> npt.NDArray[np.float32]:
        """The same of stored targets: the tail mass is spread evenly over the classes that a frame did not keep."""
        shape = targets.num_frames, len(self.phones)
        frames_E = np.repeat(np.arange(targets.num_frames), targets.counts_T)
        cells_E = frames_E * len(self.phones) + self.column_of_class_V[targets.class_ids]
        probs_E = np.exp(targets.log_probs.astype(np.float64))
        kept_mass_TC = np.bincount(cells_E, weights=probs_E, minlength=shape[0] * shape[1]).reshape(shape)
        num_kept_TC = np.bincount(cells_E, minlength=shape[0] * shape[1]).reshape(shape)
        num_classes_C = np.bincount(self.column_of_class_V, minlength=len(self.phones))
        # At least 1: a frame that kept every class has no tail to share out.
        num_left_T = np.maximum(targets.num_classes - targets.counts_T, 1)
        share_T = targets.tail_mass[:, 0].astype(np.float64) / num_left_T
        probs_TC = kept_mass_TC + (num_classes_C - num_kept_TC) * share_T[:, None]
        return np.log(np.maximum(probs_TC, _FLOOR)).astype(np.float32)
