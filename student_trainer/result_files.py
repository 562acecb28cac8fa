"""``run.json`` and ``evaluation-<splits>.json``, as a comparison reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.strict import StrictModel
from student_trainer.config import TrainConfig, Units
from student_trainer.metric_names import COUNTS, METRICS, Metric, leading

# Of a run's setup: how many utterances of the corpus it was trained without.
LEFT_OUT = "utterances_left_out"


class _Record(StrictModel):
    """Keys that a comparison does not need are passed over."""

    model_config = ConfigDict(extra="ignore")


class MetricValues(_Record):
    """Rates in percent, cross-entropy in nats per frame; None where an evaluation does not have them."""

    frame_error_rate: float | None = None
    token_error_rate: float | None = None
    phone_error_rate: float | None = None
    word_error_rate: float | None = None
    cross_entropy: float | None = None
    calibration_error: float | None = None

    @model_validator(mode="after")
    def _check_leading(self) -> Self:
        if self.value(self.leading) is None:
            raise ValueError("there is no frame_error_rate and, of CTC, no token_error_rate; expected one of them")
        return self

    def value(self, metric: Metric) -> float | None:
        found: float | None = getattr(self, metric)
        return found

    @property
    def leading(self) -> Metric:
        return leading([metric for metric in METRICS if self.value(metric) is not None])

    @property
    def error(self) -> float:
        """The leading metric's."""
        found = self.value(self.leading)
        assert found is not None  # checked above
        return found


class UtteranceErrors(_Record):
    """What was not counted is None."""

    utterance_id: str
    frames: int | None = None
    frame_errors: int | None = None
    tokens: int | None = None
    token_errors: int | None = None
    phones: int | None = None
    phone_errors: int | None = None
    words: int | None = None
    word_errors: int | None = None


class Evaluation(MetricValues):
    """``evaluation-<splits>.json``.

    Attributes:
        units: what CTC is evaluated in; None of labels of frames.
        transcripts_digest: None where neither words were decoded by a graph nor CTC.
        weights_digest: of the student that was evaluated; None of an ensemble.
        graph_digest: None where no words were decoded by a graph.
        left_out: of a dataset's evaluation, the utterances it has no labels for.
    """

    kind: Literal["student", "ensemble"]
    name: str
    splits: tuple[str, ...]
    corpus_digest: str
    inventory_digest: str
    weights_digest: str | None = None
    units: Units | None = None
    transcripts_digest: str | None = None
    graph_digest: str | None = None
    utterances: Annotated[tuple[UtteranceErrors, ...], Field(min_length=1)]
    left_out: tuple[SkippedUtterance, ...] = ()

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        for utterance in self.utterances:
            for field in COUNTS[self.leading]:
                if getattr(utterance, field) is None:
                    raise ValueError(
                        f"utterance {utterance.utterance_id} has no '{field}', of which the {self.leading} is made"
                    )
        return self

    @property
    def counted(self) -> str:
        """``frames`` or, of CTC, ``tokens``: what its leading metric counts errors among."""
        return COUNTS[self.leading][1]

    @property
    def num_counted(self) -> int:
        return sum(self.counts().values())

    def counts(self) -> dict[str, int]:
        """Number of frames, or tokens, by utterance id."""
        return {utterance.utterance_id: getattr(utterance, self.counted) for utterance in self.utterances}


class Epoch(_Record):
    epoch: int
    dev: MetricValues | None = None


class Run(_Record):
    """``run.json``.

    Attributes:
        dataset_digest: a list where teachers were switched.
        transcripts_digest: None of labels of frames.
        hard_labels_digest: of the utterances whose hard labels are in use; None where those of all are.
    """

    config: TrainConfig
    corpus_digest: str
    inventory_digest: str
    dataset_digest: str | tuple[str, ...] | None
    transcripts_digest: str | None = None
    hard_labels_digest: str | None = None
    num_parameters: int
    left_out: tuple[SkippedUtterance, ...] = ()
    history: tuple[Epoch, ...]

    @property
    def dataset_digests(self) -> tuple[str, ...]:
        return (self.dataset_digest,) if isinstance(self.dataset_digest, str) else self.dataset_digest or ()

    def setup(self) -> dict[str, Any]:
        """What decides the result, less the seed, by dotted name. Digests stand for paths."""
        settings = flat_settings(self.config.result_settings()) | {"name": self.config.name}
        del settings["seed"], settings["training.num_threads"]
        data = {"corpus_digest": self.corpus_digest, "dataset_digest": self.dataset_digest}
        for name in ("transcripts_digest", "hard_labels_digest"):
            if getattr(self, name) is not None:
                data[name] = getattr(self, name)
        return settings | data | {LEFT_OUT: len(self.left_out)}


def flat_settings(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted name."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flat_settings(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return flat
