"""The published targets as a run uses them: joined to the corpus, narrowed, their frames weighed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from softlabel_schemas.corpus import Corpus, Utterance
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.frame_selection import frame_weights, silence_classes
from softlabel_schemas.narrowing import check_derivable, narrow
from softlabel_schemas.selection import NO_LABEL
from softlabel_schemas.shard import LabelledUtterance
from softlabel_schemas.targets import SoftTargets
from softlabel_schemas.tempering import check_tempered
from student_trainer.config import SoftLabelConfig


class WeightedTargets(NamedTuple):
    """Soft targets of an utterance and the weight of each frame, float32 [T]; None: 1."""

    soft: SoftTargets
    weights_T: npt.NDArray[np.float32] | None


class SoftLabels:
    """The published targets of a corpus, at one temperature and selection.

    Raises:
        InputError: the dataset does not fit the corpus or cannot give what is asked; both values are named.
    """

    def __init__(
        self, dataset: SoftLabelDataset, config: SoftLabelConfig, corpus: Corpus, inventory_digest: str
    ) -> None:
        spec = dataset.manifest.spec
        if spec.inventory_digest != inventory_digest:
            raise InputError(
                f"{dataset.store.url}: labels are of class inventory {spec.inventory_digest[:12]} "
                f"({spec.num_classes} classes), the student's is {inventory_digest[:12]}"
            )
        shift = corpus.hard_label_frame_shift_ms
        if shift is not None and shift != spec.frame_shift_ms:
            raise InputError(
                f"{dataset.store.url}: frame shift of the soft targets is {spec.frame_shift_ms:g} ms, "
                f"of the hard labels {shift:g} ms"
            )
        if config.temperature not in spec.temperatures:
            raise InputError(
                f"{dataset.store.url}: temperature {config.temperature:g} is asked for, "
                f"tails are stored for {', '.join(f'{t:g}' for t in spec.temperatures)}"
            )
        check_tempered(spec, config.temperature, where=dataset.store.url)
        if config.selection is not None:
            check_derivable(
                spec.selection, config.selection, num_classes=spec.num_classes, temperature=config.temperature
            )
        self._selection = spec.selection if config.selection is None else config.selection
        self._silence_V = None
        for frames in (config.frames, self._selection.frames):
            if frames is not None:
                # Of the dataset's inventory, which is the student's.
                self._silence_V = silence_classes(dataset.inventory, frames)
        self._blank = None
        if config.frames is not None and config.frames.blank < 1:
            self._blank = dataset.inventory.blank_id
        self.dataset, self.config = dataset, config

    def of(self, utterances: Sequence[Utterance]) -> list[WeightedTargets]:
        """Targets in the order of ``utterances``; each is joined by id, a missing one or another length raises."""
        try:
            stored = self.dataset.read_utterances([utterance.utterance_id for utterance in utterances])
        except KeyError as error:
            raise InputError(f"no soft targets for utterance {error.args[0]}") from None
        return self.from_stored(utterances, stored)

    def from_stored(
        self, utterances: Sequence[Utterance], stored: Sequence[LabelledUtterance]
    ) -> list[WeightedTargets]:
        """As :meth:`of`, of rows of the dataset that were read already: one for each of ``utterances``, in their order."""
        found = []
        for utterance, labelled in zip(utterances, stored, strict=True):
            targets, labels_T = labelled.targets, utterance.hard_labels
            if labels_T is None:
                labels_T = np.full(targets.num_frames, NO_LABEL, dtype=np.int32)
            if len(labels_T) != targets.num_frames:
                raise InputError(
                    f"utterance {utterance.utterance_id}: {targets.num_frames} frames of soft targets, "
                    f"{len(labels_T)} of hard labels"
                )
            weights_T = None
            if self.config.frames is not None and self._silence_V is not None:
                # From all that is stored: a narrower selection may be a sample.
                weights_T = frame_weights(targets, labels_T, self._silence_V, self.config.frames)
                if self._blank is not None:
                    is_blank_T = targets.top1_T() == self._blank
                    weights_T[is_blank_T] = np.minimum(weights_T[is_blank_T], np.float32(self.config.frames.blank))
            targets = narrow(
                targets,
                self.dataset.manifest.spec,
                self._selection,
                utterance_id=utterance.utterance_id,
                hard_labels_T=labels_T,
                silence_V=self._silence_V,
            )
            if self._selection.frames is not None:
                # Without entries, so that some tail modes would take the tail for a target.
                kept_T = (targets.counts_T > 0).astype(np.float32)
                weights_T = kept_T if weights_T is None else weights_T * kept_T
            found.append(WeightedTargets(targets, weights_T))
        return found
