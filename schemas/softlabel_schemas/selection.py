"""Selection: which classes of a frame's posterior are kept, and of which frames.

Six policies, of three kinds. Classes are ranked by falling probability, ties by rising class id.

* **A prefix** of the ranking, at least its first class: :class:`TopK`, :class:`Mass`, :class:`Threshold`. With
  ``keep_hard_label`` the hard label's class follows as a further entry where the prefix left it out, so that its probability
  is known exactly.
* **A prefix whose length the whole utterance decides**: :class:`ByteBudget`.
* **A sample**: :class:`RandomSampling`, :class:`HeadAndSample`. What is stored is an estimate of the posterior, without a tail.

Bias. Of a prefix, a student trained on the kept entries *renormalised* learns p(i) / kept mass on the kept classes and 0 on
the others: too sharp, by what the tail held. With the tail as a ghost class it learns p(i) on the kept classes, and only how
the tail is spread is left to it. The tail mass is stored so that the student can choose (FORMAT.md, "Reading"). The
expectation of a sample over the draws is the posterior itself, with either tail mode, since no tail is left; what is paid is
variance.

With ``frames`` any policy drops frames too: they are stored without entries. See :mod:`softlabel_schemas.frame_selection` for
the rules and their bias.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from softlabel_schemas.frame_selection import FrameSelection
from softlabel_schemas.strict import StrictModel, shortened

# Counts are stored in at most 16 bits; one entry more is left for the hard label.
_MAX_ENTRIES = 65_534
Entries = Annotated[int, Field(ge=1, le=_MAX_ENTRIES)]
Probability = Annotated[float, Field(gt=0, le=1)]
# Canonical JSON has integers of up to 2^53 without loss in every language.
Seed = Annotated[int, Field(ge=0, lt=2**53)]
# In the arrays of hard labels: this frame has none.
NO_LABEL = -1
# A log-probability below is stored as this one: log-probabilities are finite.
MIN_LOG_PROB = -100.0


class _Policy(StrictModel):
    """``frames``: at capture a frame is kept (weight 1) or dropped (weight 0). Left out of stored documents where None."""

    frames: FrameSelection | None = Field(default=None, exclude_if=lambda frames: frames is None)

    @model_validator(mode="after")
    def _check_frames(self) -> Self:
        if self.frames is not None:
            weights = (self.frames.disagreeing, self.frames.uncertain, self.frames.silence)
            between = [weight for weight in weights if weight not in (0, 1)]
            if between:
                raise ValueError(
                    f"a selection keeps a frame (weight 1) or drops it (0), found a weight of {between[0]:g}; "
                    "students can weigh frames when they read"
                )
        return self


class TopK(_Policy):
    """The ``k`` likeliest classes. Source: Yang et al., "Essence Knowledge Distillation for Speech Recognition" (2019)."""

    policy: Literal["top_k"] = "top_k"
    k: Entries
    keep_hard_label: bool = False

    @property
    def cap(self) -> int:
        return self.k


class Mass(_Policy):
    """The fewest classes whose probability reaches ``mass``, at most ``max_entries``. Source: as :class:`TopK`.

    What renormalising distorts is bounded: by 1 / ``mass``, where ``max_entries`` does not cut first.
    """

    policy: Literal["mass"] = "mass"
    mass: Probability
    max_entries: Entries
    keep_hard_label: bool = False

    @property
    def cap(self) -> int:
        return self.max_entries


class Threshold(_Policy):
    """The classes of probability ``min_prob`` or more, at most ``max_entries``.

    The flatter a posterior, the less of it is kept: renormalised, uncertain frames are distorted most.
    """

    policy: Literal["threshold"] = "threshold"
    min_prob: Probability
    max_entries: Entries
    keep_hard_label: bool = False

    @property
    def cap(self) -> int:
        return self.max_entries


class RandomSampling(_Policy):
    """``draws`` classes, drawn with replacement from the posterior; each is stored with count / draws. No tail is left.

    Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (ACL 2025), with the
    posterior itself as the proposal: all importance weights are then equal. Unbiased: the expected target is the posterior,
    and so is the expected gradient that of the whole posterior. The variance of a target is p (1 - p) / draws; the sample is
    drawn once and met again in every epoch, so a student large enough to learn a corpus by heart fits the sample and not its
    expectation. At temperature 1 only: a tempered sample is biased.
    """

    policy: Literal["random_sampling"] = "random_sampling"
    draws: Entries
    seed: Seed = 0
    keep_hard_label: ClassVar[bool] = False
    num_head: ClassVar[int] = 0

    @property
    def cap(self) -> int:
        return self.draws


class HeadAndSample(_Policy):
    """The ``k`` likeliest classes exactly, and ``draws`` from the others, each stored with tail mass x count / draws.

    Stratified sampling (Cochran, "Sampling Techniques", chapter 5) with one stratum taken whole. Unbiased, as
    :class:`RandomSampling`. The head has no variance; that of a class outside it is m p (1 - p / m) / draws for a tail of mass
    m, below p (1 - p) / draws: with as many draws it is never noisier than a plain sample, and costs k entries more.
    At temperature 1 only.
    """

    policy: Literal["head_and_sample"] = "head_and_sample"
    k: Entries
    draws: Entries
    seed: Seed = 0
    keep_hard_label: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_cap(self) -> Self:
        if self.cap > _MAX_ENTRIES:
            raise ValueError(f"k + draws is {self.cap}, at most {_MAX_ENTRIES} entries of a frame can be stored")
        return self

    @property
    def num_head(self) -> int:
        return self.k

    @property
    def cap(self) -> int:
        return self.k + self.draws


class ByteBudget(_Policy):
    """As many entries as an utterance's frames may take of ``bytes_per_frame``, on average, in the published dataset; of each
    frame's ``max_entries`` likeliest those that hold the most mass of the utterance, and at least one of each frame.

    See :mod:`softlabel_schemas.byte_budget`. Biased as :class:`TopK`, by less at the same bytes; the entries go to
    frames whose posterior is spread over some classes, few to those of one likely class.
    """

    policy: Literal["byte_budget"] = "byte_budget"
    bytes_per_frame: Annotated[float, Field(gt=0, le=1_000_000)]
    max_entries: Entries
    keep_hard_label: ClassVar[bool] = False

    @property
    def cap(self) -> int:
        return self.max_entries


PrefixSelection = TopK | Mass | Threshold
SampledSelection = RandomSampling | HeadAndSample
AnySelection = PrefixSelection | SampledSelection | ByteBudget
Selection = Annotated[AnySelection, Field(discriminator="policy")]


def least_entries_per_frame(selection: AnySelection, num_classes: int) -> int:
    """That each frame has, where it is not dropped: the likeliest ones, whose probabilities are known."""
    return min(selection.k, num_classes) if isinstance(selection, TopK) else 1


def max_entries_per_frame(selection: AnySelection, num_classes: int) -> int:
    return min(selection.cap + int(selection.keep_hard_label), num_classes)


def check_sampled_temperatures(selection: AnySelection, temperatures: tuple[float, ...]) -> None:
    """Raises ValueError where a sample is asked for at other temperatures than 1."""
    if isinstance(selection, SampledSelection) and temperatures != (1.0,):
        raise ValueError(
            f"a '{selection.policy}' selection is drawn at temperature 1 and gives no other: "
            f"temperatures must be [1.0], found {shortened(list(temperatures))}"
        )


def prefix_lengths(selection: PrefixSelection, probs_TM: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """How many of each frame's ranked classes the policy keeps, int64 [T].

    Args:
        probs_TM: ranked probabilities [T, M]; 0 where a frame has fewer than M.
    """
    if isinstance(selection, TopK):
        wanted = np.full(len(probs_TM), selection.k)
    elif isinstance(selection, Mass):
        # Keep an entry while the entries before it have not reached the mass.
        before_TM = np.cumsum(probs_TM, axis=1) - probs_TM
        wanted = (before_TM < selection.mass).sum(axis=1)
    else:
        wanted = (probs_TM >= selection.min_prob).sum(axis=1)
    available = (probs_TM > 0).sum(axis=1)
    return np.asarray(np.minimum(np.clip(wanted, 1, selection.cap), available), dtype=np.int64)
