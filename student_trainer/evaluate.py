"""Evaluate a student, or the ensemble that a dataset was made with, by the same code against hard labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from softlabel_schemas.command_line import needs_extra, progress
from softlabel_schemas.corpus import Corpus, check_hard_labels, load_corpus
from softlabel_schemas.dataset import SoftLabelDataset, open_dataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.selection import SampledSelection
from softlabel_schemas.targets import SoftTargets
from student_trainer.batch import Batch, Example
from student_trainer.config import Units
from student_trainer.ctc import Spelling, transcripts_digest
from student_trainer.data import TrainingData
from student_trainer.device import evaluation_device
from student_trainer.left_out import leave_out_skipped, say_what_is_left_out, to_json
from student_trainer.metrics import FramePosteriors, Metrics
from student_trainer.models import AcousticModel
from student_trainer.phone_posteriors import PhoneColumns
from student_trainer.run_folder import RunFolder, set_threads
from student_trainer.shared_features import SharedFeatures
from student_trainer.token_errors import (
    TokenMetrics,
    against_transcripts,
    check_transcribed,
    load_transcribed_corpus,
    stored_token_metrics,
    token_metrics,
)

if TYPE_CHECKING:
    from student_trainer.decode import WordErrors


@dataclass(frozen=True, slots=True, kw_only=True)
class WordDecoding:
    """``graph``: folder of a decoding graph; ``settings``: file that ``student-trainer tune-decoder`` wrote."""

    graph: str
    settings: str


def check_output(output: str) -> None:
    """Before the work: raises InputError where no file can be written there."""
    if Path(output).is_dir():
        raise InputError(f"{output} is a folder; give the name of a JSON file")


def evaluate_run(
    run: str | Path,
    manifest: str,
    splits: Sequence[str],
    output: str | None,
    decoding: WordDecoding | None = None,
    shared: SharedFeatures | None = None,
) -> dict[str, Any]:
    """Evaluate a run's model and write ``evaluation-<splits>.json`` into its folder (or to ``output``); ``shared``: see
    ``train``."""
    folder = RunFolder(run)
    output = output or str(folder.path / evaluation_name(splits))
    check_output(output)
    # Before the weights: should training write others in between, the evaluation counts as of older ones and is made again.
    weights_digest = folder.weights_digest()
    model, config, inventory = folder.load_model()
    set_threads(config.training.num_threads)
    model = model.to(evaluation_device(config.training.device))
    what = {"kind": "student", "name": config.name, "run": str(run), "weights_digest": weights_digest}
    if config.ctc is not None:
        check_no_graph(decoding)
        corpus = load_transcribed_corpus(manifest, splits)
        data = TrainingData(corpus, config.front_end, spelling=Spelling(inventory, config.ctc.units), shared=shared)
        with progress("evaluate", len(corpus), "utterances") as advance:
            tokens = token_metrics(model, data, inventory, advance)
        what |= against_transcripts(corpus, config.ctc.units)
        return _write(tokens, corpus, splits, what, output)
    corpus = load_evaluation_corpus(manifest, splits, inventory)
    words = _word_errors(decoding, inventory, corpus, splits, where=manifest)
    data = TrainingData(corpus, config.front_end, shared=shared)
    metrics = Metrics(inventory)
    with progress("evaluate", len(corpus), "utterances") as advance:
        for batch_labels, posteriors in model_posteriors(model, data, PhoneColumns.of(inventory) if words else None):
            for (utterance_id, labels_T), found in zip(batch_labels, posteriors, strict=True):
                _add(metrics, utterance_id, labels_T, found, words)
                advance(len(metrics.utterances))
    what |= _word_setup(words, corpus)
    return _write(metrics, corpus, splits, what, output)


def evaluate_dataset(
    url: str,
    manifest: str,
    splits: Sequence[str],
    output: str,
    decoding: WordDecoding | None = None,
    units: Units | None = None,
) -> dict[str, Any]:
    """Evaluate the teacher ensemble from its stored targets and write the result to ``output``.

    Utterances that the dataset skipped are left out, and listed there under ``left_out``.

    Cross-entropy is that of the stored probabilities, of which a lossy codec keeps none below its floor (``floors.FLOORS``):
    where the teachers gave a hard label less than that, 1.7e-6 (mtf-sqrt) or 1.2e-7 (packed-u8), it reads too low.

    Args:
        units: of CTC teachers, what transcripts are spelled in; None evaluates frame by frame.
    """
    check_output(output)
    dataset = open_ensemble(url)
    whole_corpus = load_corpus(manifest).select_splits(splits)
    corpus, left_out = leave_out_skipped(whole_corpus, dataset)
    what: dict[str, Any] = {
        "kind": "ensemble",
        "name": "ensemble",
        "dataset": dataset.manifest.content_digest,
        "left_out": to_json(left_out),
    }
    if units is not None:
        check_no_graph(decoding)
        check_transcribed(corpus, splits, where=manifest)
    else:
        check_labels(corpus, dataset.inventory, splits, where=manifest)
    say_what_is_left_out(left_out, len(whole_corpus), where=output, url=dataset.store.url)
    if units is not None:
        what |= against_transcripts(whole_corpus, units)
        return _write(stored_token_metrics(dataset, corpus, units), whole_corpus, splits, what, output)
    words = _word_errors(decoding, dataset.inventory, corpus, splits, where=manifest)
    metrics = Metrics(dataset.inventory)
    columns = PhoneColumns.of(dataset.inventory) if words else None
    with progress("evaluate", len(corpus), "utterances") as advance:
        for utterance_id, labels_T, found in dataset_posteriors(dataset, corpus, columns):
            _add(metrics, utterance_id, labels_T, found, words)
            advance(len(metrics.utterances))
    what |= _word_setup(words, whole_corpus)
    return _write(metrics, whole_corpus, splits, what, output)


def open_ensemble(url: str) -> SoftLabelDataset:
    """A dataset that says of every frame what the ensemble does. Raises InputError where its selection dropped frames, or drew
    classes."""
    dataset = open_dataset(url)
    selection = dataset.manifest.spec.selection
    if isinstance(selection, SampledSelection):
        raise InputError(
            f'{url} holds a sample of each posterior (selection.policy = "{selection.policy}"), in which the class drawn most '
            "often counts as the likeliest; evaluate labels of the same speech that keep the likeliest classes"
        )
    frames = selection.frames
    if frames is not None:
        dropped = [name for name in ("disagreeing", "uncertain", "silence") if getattr(frames, name) == 0]
        raise InputError(
            f"{url} was labelled without some frames (selection.frames drops {', '.join(dropped)}), which would count as the "
            "ensemble's errors; evaluate a dataset of the same speech that was labelled without selection.frames"
        )
    return dataset


def _word_errors(
    decoding: WordDecoding | None, inventory: ClassInventory, corpus: Corpus, splits: Sequence[str], *, where: str
) -> WordErrors | None:
    if decoding is None:
        return None
    # Here: only decoding needs the decoder's libraries.
    with needs_extra("decode"):
        from student_trainer.decode import Decoder, WordErrors
        from student_trainer.graph_folder import load_graph, transcripts
        from student_trainer.tune import load_settings

    graph = load_graph(decoding.graph, inventory)
    settings = load_settings(decoding.settings, graph, splits)
    return WordErrors(Decoder(graph, settings), transcripts(corpus, where=where))


def _word_setup(words: WordErrors | None, corpus: Corpus) -> dict[str, Any]:
    """What decided the word errors, the transcripts among it: the corpus digest is not over them."""
    return {} if words is None else words.setup() | {"transcripts_digest": transcripts_digest(corpus)}


def _add(
    metrics: Metrics,
    utterance_id: str,
    labels_T: npt.NDArray[np.integer],
    found: FramePosteriors,
    words: WordErrors | None,
) -> None:
    record = None
    if words is not None:
        assert found.phone_log_probs_TC is not None
        record = words.record(utterance_id, found.phone_log_probs_TC)
    metrics.add(utterance_id, labels_T, found, record)


def evaluation_name(splits: Sequence[str]) -> str:
    return f"evaluation-{'-'.join(splits)}.json"


def load_evaluation_corpus(manifest: str, splits: Sequence[str], inventory: ClassInventory) -> Corpus:
    """Raises InputError unless every utterance has hard labels of this inventory."""
    corpus = load_corpus(manifest).select_splits(splits)
    check_labels(corpus, inventory, splits, where=manifest)
    return corpus


def check_no_graph(graph: object) -> None:
    """Raises InputError where CTC is to be decoded by one."""
    if graph is not None:
        raise InputError("a graph decodes the phones of each frame; CTC is decoded greedily: leave --graph out")


def check_labels(corpus: Corpus, inventory: ClassInventory, splits: Sequence[str], *, where: str) -> None:
    """Raises InputError unless every utterance has hard labels of this inventory, and some frame has one."""
    check_hard_labels(corpus, inventory, where=where)
    hard_labels = corpus.table["hard_labels"]
    if hard_labels.null_count:
        raise InputError(f"{where}: {hard_labels.null_count} utterances of {list(splits)} have no hard labels")
    if not pc.any(pc.greater_equal(pc.list_flatten(hard_labels), 0)).as_py():
        raise InputError(
            f"{where}: no frame of {list(splits)} has a hard label (all are -1), and errors are counted among those that have "
            "one; label this speech, or give other splits"
        )


def model_posteriors(
    model: AcousticModel, data: TrainingData, columns: PhoneColumns | None = None
) -> Iterator[tuple[list[tuple[str, npt.NDArray[np.int64]]], list[FramePosteriors]]]:
    """Posteriors of the decoding head, batch by batch in the order of ``batches_to_evaluate``; of phones, too, where
    ``columns`` are given. They are computed where the model is."""
    device = next(model.parameters()).device
    for examples, batch in data.batches_to_evaluate(device):
        yield _batch_posteriors(model, examples, batch, columns)


@torch.no_grad()
def _batch_posteriors(
    model: AcousticModel, examples: Sequence[Example], batch: Batch, columns: PhoneColumns | None
) -> tuple[list[tuple[str, npt.NDArray[np.int64]]], list[FramePosteriors]]:
    logits_BTV, lengths_B = model(batch.features_BTD, batch.lengths_B)
    check_lengths(batch, lengths_B)
    log_probs_BTV = logits_BTV.float().log_softmax(dim=-1)
    confidence_BT, top1_BT = log_probs_BTV.max(dim=-1)
    labelled, posteriors = [], []
    for row, example in enumerate(examples):
        assert example.hard_labels is not None
        labels_T = example.hard_labels
        frames, labels_T1 = slice(0, len(labels_T)), torch.from_numpy(labels_T).clamp(min=0)[:, None]
        of_label = log_probs_BTV[row, frames].gather(1, labels_T1.to(log_probs_BTV.device))
        labelled.append((example.utterance_id, labels_T))
        posteriors.append(
            FramePosteriors(
                top1_T=top1_BT[row, frames].cpu().numpy(),
                confidence_T=confidence_BT[row, frames].exp().cpu().numpy(),
                label_log_prob_T=of_label.squeeze(1).cpu().numpy(),
                phone_log_probs_TC=columns.of_model(log_probs_BTV[row, frames]) if columns else None,
            )
        )
    return labelled, posteriors


def check_lengths(batch: Batch, lengths_B: torch.Tensor) -> None:
    """Raises InputError where a model's output frames are not the label frames; gives both."""
    wrong = torch.nonzero(lengths_B != batch.label_lengths_B)
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"utterance {batch.utterance_ids[row]}: the model gives {int(lengths_B[row])} frames, "
            f"there are {int(batch.label_lengths_B[row])} labels; front end and labels need the same frame shift"
        )


def dataset_posteriors(
    dataset: SoftLabelDataset, corpus: Corpus, columns: PhoneColumns | None
) -> Iterator[tuple[str, npt.NDArray[np.int32], FramePosteriors]]:
    """Id, hard labels and posteriors of each utterance of ``corpus``, all of which have hard labels.

    Raises:
        InputError: an utterance has no soft targets, or not as many frames of them as of hard labels.
    """
    for utterance in corpus:
        try:
            targets = dataset[utterance.utterance_id].targets
        except KeyError as error:
            raise InputError(f"no soft targets for utterance {error.args[0]}") from None
        labels_T = utterance.hard_labels
        assert labels_T is not None
        if targets.num_frames != len(labels_T):
            raise InputError(
                f"utterance {utterance.utterance_id}: {targets.num_frames} frames of soft targets, "
                f"{len(labels_T)} of hard labels"
            )
        yield utterance.utterance_id, labels_T, stored_posteriors(targets, labels_T, columns)


def stored_posteriors(
    targets: SoftTargets, labels_T: npt.NDArray[np.integer], columns: PhoneColumns | None = None
) -> FramePosteriors:
    """Posteriors from stored targets, none below the codec's floor; a hard label that was not kept has no known probability
    (NaN)."""
    ids_TM, log_probs_TM = targets.padded()
    is_label_TM = (ids_TM == labels_T[:, None]) & np.isfinite(log_probs_TM)
    label_log_prob_T = np.where(is_label_TM, log_probs_TM, -np.inf).max(axis=1, initial=-np.inf)
    return FramePosteriors(
        top1_T=targets.top1_T(),
        confidence_T=np.exp(log_probs_TM.max(axis=1, initial=-np.inf)),
        label_log_prob_T=np.where(np.isfinite(label_log_prob_T), label_log_prob_T, np.nan),
        phone_log_probs_TC=columns.of_stored(targets) if columns else None,
    )


def _write(
    metrics: Metrics | TokenMetrics, corpus: Corpus, splits: Sequence[str], what: dict[str, Any], output: str
) -> dict[str, Any]:
    result = {
        **what,
        "splits": list(splits),
        "corpus_digest": corpus.digest,
        "inventory_digest": metrics.inventory.digest(),
        **metrics.summary(),
        # Sorted, so that two evaluations can be paired line by line.
        "utterances": sorted(metrics.utterances, key=lambda record: str(record["utterance_id"])),
    }
    path = Path(output)
    RunFolder(path.parent).write_json(path.name, result)
    return result
