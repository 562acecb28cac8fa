"""TRAIN.toml -> frozen models. Paths are relative to the file's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from softlabel_schemas.errors import InputError
from softlabel_schemas.folds import Fold, NumFolds
from softlabel_schemas.frame_selection import FrameSelection, Weight
from softlabel_schemas.front_end import Fbank, FrontEnd
from softlabel_schemas.selection import Selection
from softlabel_schemas.strict import StrictModel, parse, read_toml

Units = Literal["characters", "words"]
# Torch takes no larger ones.
Seed = Annotated[int, Field(ge=0, lt=2**64)]
TailMode = Literal["renormalize", "ghost", "to_hard_label", "uniform"]
# Keys that hold a path or a URL, or a list of them, by table.
_PATHS = {"corpus": ("manifest", "inventory"), "soft_labels": ("url", "urls", "cache")}


class CorpusConfig(StrictModel):
    """Attributes:
    hard_label_splits: those of ``train_splits`` whose hard labels are used; the others train as if they had none. None: all.
    num_folds, held_out_fold: the speakers of this fold have no part in the run, neither as training nor as dev speech, so that
        its model can label them (out-of-fold; see ``softlabel_schemas.folds``). None: all speakers.
    """

    manifest: str
    inventory: str
    train_splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("train",)
    dev_splits: tuple[str, ...] = ("dev",)
    hard_label_splits: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    num_folds: NumFolds | None = None
    # Strict: false is not fold 0.
    held_out_fold: Annotated[int, Field(ge=0, strict=True)] | None = None

    @property
    def held_out(self) -> Fold | None:
        if self.num_folds is None or self.held_out_fold is None:
            return None
        return Fold(num_folds=self.num_folds, fold=self.held_out_fold)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.num_folds is None) != (self.held_out_fold is None):
            raise ValueError("num_folds and held_out_fold belong together: give both or neither")
        if self.num_folds is not None and self.held_out_fold is not None and self.held_out_fold >= self.num_folds:
            raise ValueError(f"held_out_fold is {self.held_out_fold}, expected 0 to {self.num_folds - 1}")
        other = sorted(set(self.hard_label_splits or ()) - set(self.train_splits))
        if other:
            raise ValueError(
                f"hard_label_splits must be among train_splits, {', '.join(self.train_splits)}; found {', '.join(other)}"
            )
        return self


class FrameWeights(FrameSelection):
    """Attributes:
    blank: of frames whose likeliest class is the blank of CTC. Most frames of a CTC teacher are, and say only that it would
        rather speak elsewhere: at 0 the student learns from its spikes (the mask of Kurata and Audhkhasi, "Guiding CTC
        posterior spike timings for improved posterior fusion and knowledge distillation", 2019).
    """

    blank: Weight = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.disagreeing == self.uncertain == self.silence == self.blank == 1:
            raise ValueError("no frame is selected: give disagreeing, uncertain, silence or blank a weight below 1")
        return self


class SoftLabelConfig(StrictModel):
    """How the stored targets are used.

    Attributes:
        url: of the dataset.
        urls: in its place, several datasets that label the same speech, such as one for each teacher: each batch is taught by
            one of them, drawn at random (see ``switching.py``).
        weight: of the soft loss; the hard loss has 1 - weight.
        final_weight: where ``weight`` arrives, linearly, at the end of the run; None keeps it as it is.
        temperature: one of those the dataset stores tails for; the soft loss is scaled by its square (Hinton et al.).
        tail: what becomes of the probability outside the kept entries; see ``loss.py``.
        num_heads: 1 shares an output layer, 2 gives the soft loss its own.
        decoding_head: of two, the one that the model is evaluated and exported with; the other serves training alone.
        selection: narrower than the stored one; None uses all that is stored.
        frames: weights of frames, from the stored targets and the hard labels; None counts all frames alike.
        cache: local folder that keeps the files of the dataset, for URLs that are slow or costly to read; None keeps none.
        cache_gib: its largest size, GiB; several runs may share one folder.
    """

    url: str | None = None
    urls: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    final_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    tail: TailMode = "ghost"
    num_heads: Literal[1, 2] = 1
    decoding_head: Literal["hard", "soft"] = "hard"
    selection: Selection | None = None
    frames: FrameWeights | None = None
    cache: str | None = None
    cache_gib: Annotated[float, Field(gt=0)] = 50.0

    @property
    def locations(self) -> tuple[str, ...]:
        """Of the dataset, or of them all."""
        return self.urls or (() if self.url is None else (self.url,))

    @property
    def has_all_weight(self) -> bool:
        """Whether the hard loss has none throughout the run."""
        return self.weight == 1 and self.final_weight in (None, 1)

    @property
    def as_one_head(self) -> str:
        """What to do where the hard head of two would stay untrained."""
        return "use num_heads = 1" + (" and leave decoding_head out" if self.decoding_head == "soft" else "")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.url is None) == (self.urls is None):
            raise ValueError(f"give url or urls, one of the two; found {'neither' if self.url is None else 'both'}")
        if self.urls is not None and len(set(self.urls)) < len(self.urls):
            raise ValueError(f"urls must differ, found {', '.join(self.urls)}")
        if self.decoding_head == "soft" and self.num_heads == 1:
            raise ValueError(
                'decoding_head = "soft" needs num_heads = 2: of one head there is nothing to choose, and it is left out'
            )
        if self.has_all_weight and self.num_heads == 2:
            raise ValueError(f"weight 1 with num_heads 2 leaves the hard head untrained; {self.as_one_head}")
        return self


class CtcConfig(StrictModel):
    """Hard labels are the corpus's transcripts, without times: the hard loss is that of CTC, and hard labels of frames are
    not used. Where ``soft_labels.weight`` is 1 throughout, transcripts of training speech are not used either: what cannot be
    aligned is no reason to refuse it.

    Attributes:
        units: what a transcript is a sequence of, each a class of the inventory: its "characters", where a space is the class
            "|" if there is one; or its "words", parted by spaces (phones, or pieces of words).
    """

    units: Units = "characters"


class ModelConfig(StrictModel):
    """``architecture``: tdnn, blstm, conv_glu, conformer or ``package.module:factory``."""

    architecture: str = "tdnn"
    arguments: dict[str, JsonValue] = Field(default_factory=dict)


class TrainingConfig(StrictModel):
    """Attributes:
    batch_seconds: padded speech in a batch.
    pool_seconds: speech shuffled together; a corpus up to this size is kept in memory (at every speed of the augmentation) and
        shuffled as a whole. Dev speech up to this size is kept in memory, too.
    warmup: share of the run in which the learning rate rises; it then falls to zero along a cosine.
    num_processes: that make the batches of a corpus of more than ``pool_seconds``, where a thread is too slow. They change
        nothing else.
    checkpoint_minutes: between checkpoints within an epoch; there is one after every epoch anyhow.
    precision: of the model's products in training. "bfloat16" needs about half the time where the processor has instructions
        for it, and many times as long where it has none. Weights, losses and evaluation are float32.
    device: "auto" is a CUDA GPU where torch finds one, and the processors otherwise. It is no part of the digest: a run may be
        resumed on another device, to weights that differ by rounding.
    """

    epochs: Annotated[int, Field(ge=1)] = 12
    batch_seconds: Annotated[float, Field(gt=0)] = 60.0
    pool_seconds: Annotated[float, Field(gt=0)] = 36_000.0
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    gradient_clip: Annotated[float, Field(gt=0)] = 5.0
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    num_threads: Annotated[int, Field(ge=1)] | None = None
    num_processes: Annotated[int, Field(ge=1)] | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"


class Augmentation(StrictModel):
    """Of the training speech, anew in every epoch; see ``augmentation.py`` and ``speed.py``. The defaults are for small corpora
    of read speech and short budgets, where strong masking costs more than it gives.

    Attributes:
        speeds: each utterance is played at one of these, drawn anew in every epoch; (1.0,) leaves speech as it is.
        time_masks: masks over frames, each of at most ``max_time_mask_ms``.
        frequency_masks: masks over mel bins, each of at most ``max_frequency_mask`` of them.
    """

    speeds: Annotated[tuple[Annotated[float, Field(ge=0.5, le=2)], ...], Field(min_length=1)] = (0.9, 1.0, 1.1)
    time_masks: Annotated[int, Field(ge=0)] = 2
    max_time_mask_ms: Annotated[float, Field(gt=0)] = 150.0
    frequency_masks: Annotated[int, Field(ge=0)] = 2
    max_frequency_mask: Annotated[int, Field(ge=1)] = 5


class TrainConfig(StrictModel):
    """One training run; without ``soft_labels`` it trains on hard labels alone."""

    name: str
    output: str
    seed: Seed = 0
    corpus: CorpusConfig
    soft_labels: SoftLabelConfig | None = None
    ctc: CtcConfig | None = None
    augmentation: Augmentation | None = None
    front_end: FrontEnd = Fbank(stack=3)
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.name or "/" in self.name:
            raise ValueError("name must be a plain, non-empty name")
        self._check_ctc()
        augmentation, front_end = self.augmentation, self.front_end
        if augmentation is None:
            return self
        if not isinstance(front_end, Fbank):
            raise ValueError(
                f"augmentation needs the front end 'fbank', which knows samples and frequencies; found '{front_end.kind}'"
            )
        if augmentation.frequency_masks and augmentation.max_frequency_mask > front_end.num_mel_bins:
            raise ValueError(
                f"augmentation.max_frequency_mask is {augmentation.max_frequency_mask}, more than the "
                f"{front_end.num_mel_bins} mel bins of the front end"
            )
        return self

    def _check_ctc(self) -> None:
        soft = self.soft_labels
        if self.ctc is None or soft is None:
            return
        if soft.tail == "to_hard_label":
            raise ValueError(
                'soft_labels.tail = "to_hard_label" needs hard labels of frames; with [ctc] there are none'
            )
        of_selection = None if soft.selection is None else soft.selection.frames
        for table, frames in (("frames", soft.frames), ("selection.frames", of_selection)):
            if frames is not None and frames.disagreeing < 1:
                raise ValueError(
                    f"soft_labels.{table}.disagreeing needs hard labels of frames; with [ctc] there are none"
                )

    def result_settings(self) -> dict[str, Any]:
        """What decides the result beside the contents of corpus, inventory and soft labels, which have digests of their own
        wherever they lie; a checkpoint of others is not resumed. Another device rounds otherwise; a run may go on there all the
        same."""
        exclude: dict[str, Any] = {
            "name": True,
            "output": True,
            "corpus": {"manifest", "inventory"},
            "training": {"checkpoint_minutes", "device", "num_processes"},
        }
        if self.soft_labels is not None:
            exclude["soft_labels"] = {"url", "urls", "cache", "cache_gib"}
        return self.model_dump(mode="json", exclude=exclude)


def load_config(path: str | Path) -> TrainConfig:
    """Read a TRAIN.toml and resolve its relative paths. Raises InputError."""
    return parse_config(absolute_paths(read_toml(path), Path(path).resolve().parent), where=str(path))


def parse_config(tables: Mapping[str, Any], *, where: str) -> TrainConfig:
    """A configuration to train with. Raises InputError where it is not valid, or would choose an epoch on training speech.

    Run folders are read without the latter check: those from before it can still be evaluated and exported.
    """
    config = parse(TrainConfig, tables, where=where)
    both = sorted(set(config.corpus.train_splits) & set(config.corpus.dev_splits))
    if both:
        raise InputError(
            f"{where} is not valid: corpus.train_splits and corpus.dev_splits share {', '.join(both)}: the best epoch would be "
            "chosen on training speech; leave it out of one of them (dev_splits = [] keeps the last epoch)"
        )
    return config


def absolute_paths(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The tables of a TRAIN.toml, or some of them, with relative paths taken as relative to ``folder``; URLs stay."""
    resolved: dict[str, Any] = {}
    for key, value in tables.items():
        if key in _PATHS and isinstance(value, Mapping):
            resolved[key] = {name: _absolute(inner, folder, name in _PATHS[key]) for name, inner in value.items()}
        else:
            resolved[key] = _absolute(value, folder, key == "output")
    return resolved


def _absolute(value: object, folder: Path, is_path: bool) -> object:
    if is_path and isinstance(value, list):
        return [_absolute(each, folder, is_path) for each in value]
    # Anything but text is for the model to refuse.
    return str(folder / value) if is_path and isinstance(value, str) and "://" not in value else value
