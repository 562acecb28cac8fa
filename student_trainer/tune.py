"""Choose a decoder's settings on a dev split, by the lowest word error rate; the file that keeps the choice.

A small search: acoustic scale and prior exponent together, without a word insertion penalty; then the penalty.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from softlabel_schemas.command_line import Advance, progress
from softlabel_schemas.corpus import Corpus, load_corpus
from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.strict import StrictModel, parse
from student_trainer.ctc import transcripts_digest
from student_trainer.data import TrainingData
from student_trainer.decode import Decoder, DecoderSettings, WordErrors
from student_trainer.device import evaluation_device
from student_trainer.evaluate import (
    check_labels,
    check_no_graph,
    dataset_posteriors,
    load_evaluation_corpus,
    model_posteriors,
    open_ensemble,
)
from student_trainer.graph_folder import DecodingGraph, load_graph, transcripts
from student_trainer.left_out import leave_out_skipped, say_what_is_left_out
from student_trainer.run_folder import DECODER, RunFolder, set_threads
from student_trainer.shared_features import SharedFeatures

ACOUSTIC_SCALES = (0.3, 0.5, 0.7, 1.0)
PRIOR_EXPONENTS = (0.0, 0.5, 1.0)
# Nats; 0 is tried with the scales.
WORD_INSERTION_PENALTIES = (-2.0, -1.0, 1.0, 2.0)
_NUM_TRIALS = len(ACOUSTIC_SCALES) * len(PRIOR_EXPONENTS) + len(WORD_INSERTION_PENALTIES)

LogProbs = Mapping[str, npt.NDArray[np.float32]]


class Trial(StrictModel):
    """``word_error_rate``: of the dev split with these settings, percent."""

    settings: DecoderSettings
    word_error_rate: float


class TunedDecoder(StrictModel):
    """The file: ``settings`` are those of the best of ``trials``, the first of equals.

    Attributes:
        transcripts_digest: of what the words were counted against.
        left_out: not labelled.
    """

    settings: DecoderSettings
    word_error_rate: float
    splits: tuple[str, ...]
    corpus_digest: str
    transcripts_digest: str
    graph_digest: str
    trials: tuple[Trial, ...]
    left_out: tuple[SkippedUtterance, ...] = ()


def tune_run(
    run: str | Path,
    manifest: str,
    splits: Sequence[str],
    graph: str,
    output: str | None,
    shared: SharedFeatures | None = None,
) -> TunedDecoder:
    """Choose settings for a run's model and write them to ``output``, or to ``decoder.json`` in the run's folder.

    Args:
        shared: see ``train``.

    Raises:
        InputError: ``splits`` are those that the graph was made from, or have no words; or see ``evaluate_run`` and
            ``load_graph``.
    """
    folder = RunFolder(run)
    model, config, inventory = folder.load_model()
    set_threads(config.training.num_threads)
    model = model.to(evaluation_device(config.training.device))
    if config.ctc is not None:
        check_no_graph(graph)
    decoding_graph = _graph_for(graph, inventory, splits)
    corpus = load_evaluation_corpus(manifest, splits, inventory)
    texts = _texts(corpus, splits, where=manifest)
    found: dict[str, npt.NDArray[np.float32]] = {}
    data = TrainingData(corpus, config.front_end, shared=shared)
    for labelled, posteriors in model_posteriors(model, data, decoding_graph.columns):
        for (utterance_id, _), of_utterance in zip(labelled, posteriors, strict=True):
            assert of_utterance.phone_log_probs_TC is not None
            found[utterance_id] = of_utterance.phone_log_probs_TC
    tuned = _tune(decoding_graph, found, texts, splits, corpus)
    return _write(tuned, output or str(folder.path / DECODER))


def tune_dataset(url: str, manifest: str, splits: Sequence[str], graph: str, output: str) -> TunedDecoder:
    """Choose settings for the teacher ensemble from its stored targets of a dev split and write them to ``output``."""
    dataset = open_ensemble(url)
    decoding_graph = _graph_for(graph, dataset.inventory, splits)
    whole_corpus = load_corpus(manifest).select_splits(splits)
    corpus, left_out = leave_out_skipped(whole_corpus, dataset)
    check_labels(corpus, dataset.inventory, splits, where=manifest)
    say_what_is_left_out(left_out, len(whole_corpus), where=output, url=dataset.store.url)
    texts = _texts(corpus, splits, where=manifest)
    found: dict[str, npt.NDArray[np.float32]] = {}
    for utterance_id, _, posteriors in dataset_posteriors(dataset, corpus, decoding_graph.columns):
        assert posteriors.phone_log_probs_TC is not None
        found[utterance_id] = posteriors.phone_log_probs_TC
    tuned = _tune(decoding_graph, found, texts, splits, whole_corpus)
    return _write(tuned.model_copy(update={"left_out": left_out}), output)


def load_settings(path: str, graph: DecodingGraph, splits: Sequence[str]) -> DecoderSettings:
    """Settings to decode ``splits`` with.

    Raises:
        InputError: there is no such file, the settings were chosen with another graph, or graph or settings were made from one
            of ``splits``.
    """
    file = Path(path)
    if not file.exists():
        raise InputError(
            f"{path} does not exist; choose the decoder's settings on a dev split: student-trainer tune-decoder"
        )
    tuned = parse(TunedDecoder, RunFolder(file.parent).read_json(file.name), where=path)
    if tuned.graph_digest != graph.description.digest():
        raise InputError(
            f"{path} was chosen with the graph {tuned.graph_digest[:12]}, {graph.path} is "
            f"{graph.description.digest()[:12]}; tune again with this graph"
        )
    check_apart(splits, graph.description.splits, f"{graph.path} was made from")
    check_apart(splits, tuned.splits, f"{path} was chosen on")
    return tuned.settings


def _graph_for(path: str, inventory: ClassInventory, splits: Sequence[str]) -> DecodingGraph:
    graph = load_graph(path, inventory)
    check_apart(splits, graph.description.splits, f"{path} was made from")
    return graph


def _texts(corpus: Corpus, splits: Sequence[str], *, where: str) -> dict[str, str]:
    """Transcripts by id. Raises InputError where they have no words: all settings would be equally good."""
    texts = transcripts(corpus, where=where)
    if not any(text.split() for text in texts.values()):
        raise InputError(
            f"{where}: the transcripts of {list(splits)} have no words, and a decoder's settings are chosen by errors among "
            "them; give dev splits whose transcripts have some"
        )
    return texts


def check_apart(splits: Sequence[str], used: Sequence[str], what: str) -> None:
    """Raises InputError where some of ``splits`` are among those that ``what`` names."""
    both = sorted(set(splits) & set(used))
    if both:
        raise InputError(
            f"{what} split {', '.join(both)}: its errors there say nothing about other speech; use another"
        )


def _tune(
    graph: DecodingGraph, found: LogProbs, texts: Mapping[str, str], splits: Sequence[str], corpus: Corpus
) -> TunedDecoder:
    trials: list[Trial] = []

    def best() -> Trial:
        return min(trials, key=lambda trial: trial.word_error_rate)

    with progress("tune", _NUM_TRIALS * len(found), "utterances") as advance:

        def attempt(settings: DecoderSettings) -> None:
            errors = WordErrors(Decoder(graph, settings), texts)
            trials.append(_trial(settings, errors, found, advance, len(trials) * len(found)))

        for scale, exponent in itertools.product(ACOUSTIC_SCALES, PRIOR_EXPONENTS):
            attempt(DecoderSettings(acoustic_scale=scale, prior_exponent=exponent, word_insertion_penalty=0.0))
        chosen = best().settings
        for penalty in WORD_INSERTION_PENALTIES:
            attempt(chosen.model_copy(update={"word_insertion_penalty": penalty}))
    return TunedDecoder(
        settings=best().settings,
        word_error_rate=best().word_error_rate,
        splits=tuple(splits),
        corpus_digest=corpus.digest,
        transcripts_digest=transcripts_digest(corpus),
        graph_digest=graph.description.digest(),
        trials=tuple(trials),
    )


def _trial(settings: DecoderSettings, errors: WordErrors, found: LogProbs, advance: Advance, done: int) -> Trial:
    num_words = num_errors = 0
    for utterance_id, log_probs_TC in found.items():
        record = errors.record(utterance_id, log_probs_TC)
        num_words += record["words"]
        num_errors += record["word_errors"]
        done += 1
        advance(done)
    return Trial(settings=settings, word_error_rate=100 * num_errors / max(num_words, 1))


def _write(tuned: TunedDecoder, output: str) -> TunedDecoder:
    path = Path(output)
    RunFolder(path.parent).write_json(path.name, tuned.model_dump(mode="json"))
    return tuned
