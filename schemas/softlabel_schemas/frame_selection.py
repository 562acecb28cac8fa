"""Frame selection: how much a frame's soft target counts, from the target itself and the frame's hard label.

Three rules, each with a weight from 0 (the frame is dropped) to 1 (as if there were no rule). Of several that hold for a frame
the smallest weight is taken: no rule gives back what another took.

* ``disagreeing``: the ensemble's top class is not the hard label. At 0 it is conditional teacher-student learning (Meng et
  al., 2019): the student follows the ensemble where it is right, the hard label elsewhere. Bias: what is left says that the
  ensemble is always right, so the student becomes over-confident; where the alignment is what errs (most often at the
  borders of segments), the better of the two opinions is dropped. Frames without a hard label are never touched.
* ``uncertain``: the ensemble's top class has less than ``min_top1``. Selection by confidence, after Vesely et al.,
  "Semi-supervised Training of Deep Neural Networks" (2013). Bias: towards easy frames and frequent classes; the ensemble's
  doubt, which soft targets are there to tell, is not taught.
* ``silence``: the hard label, or without one the top class, belongs to a silence phone. It is the largest class of most
  corpora and soon learned, as is the blank that distillation of CTC models often leaves out. Bias: the soft loss sees too
  little silence; posteriors of the head that it trains undervalue it.

Over a sampled store the top class is that of most draws, and its probability a share of them: both rules on it are noisy.
"""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.strict import StrictModel
from softlabel_schemas.targets import SoftTargets

Weight = Annotated[float, Field(ge=0, le=1)]


class FrameSelection(StrictModel):
    """Weights of the frames that a rule holds for; see the module's docstring.

    Attributes:
        min_top1: probability at temperature 1; the ensemble is uncertain where its top class has less.
    """

    disagreeing: Weight = 1.0
    uncertain: Weight = 1.0
    min_top1: Annotated[float, Field(gt=0, le=1)] = 0.5
    silence: Weight = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.disagreeing == self.uncertain == self.silence == 1:
            raise ValueError("no frame is selected: give disagreeing, uncertain or silence a weight below 1")
        return self


def silence_classes(inventory: ClassInventory, config: FrameSelection) -> npt.NDArray[np.bool_]:
    """Whether each class is of a silence phone, bool [V].

    Raises:
        InputError: ``config`` weighs silence, and the inventory names none.
    """
    if config.silence < 1 and not inventory.silence_phones:
        raise InputError(
            f"silence = {config.silence:g} weighs frames of silence, but the class inventory names no silence_phones; name "
            "them there, or leave 'silence' out"
        )
    silence = set(inventory.silence_phones)
    return np.array([phone in silence for phone in inventory.phones or inventory.names], dtype=bool)


def frame_weights(
    targets: SoftTargets,
    labels_T: npt.NDArray[np.integer],
    silence_V: npt.NDArray[np.bool_],
    config: FrameSelection,
) -> npt.NDArray[np.float32]:
    """Weight of each frame's soft target, float32 [T].

    A frame without entries has no top class: of the rules only silence by its hard label can hold.

    Args:
        labels_T: class id of each frame or ``NO_LABEL``.
        silence_V: see :func:`silence_classes`.

    Raises:
        ValueError: there is not one label for each frame.
    """
    if len(labels_T) != targets.num_frames:
        raise ValueError(f"{targets.num_frames} frames need one label each, found {len(labels_T)}")
    top1_T = targets.top1_T()
    has_top_T, has_label_T = top1_T >= 0, labels_T >= 0
    top1_prob_T = np.ones(targets.num_frames, dtype=np.float32)
    top1_prob_T[has_top_T] = np.exp(targets.log_probs[targets.offsets[:-1][has_top_T]])
    class_T = np.where(has_label_T, labels_T, top1_T)
    rules = (
        (config.disagreeing, has_label_T & has_top_T & (labels_T != top1_T)),
        (config.uncertain, top1_prob_T < config.min_top1),
        (config.silence, (class_T >= 0) & silence_V[class_T]),
    )
    weights_T = np.ones(targets.num_frames, dtype=np.float32)
    for weight, holds_T in rules:
        weights_T[holds_T] = np.minimum(weights_T[holds_T], np.float32(weight))
    return weights_T
