"""One run of a sweep, as a Ray task makes it: train, choose the decoder's settings, evaluate. Knows nothing of Ray.

Each step passes over what is done, so that a task that is run again goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from softlabel_schemas.corpus import load_corpus
from student_trainer.config import TrainConfig
from student_trainer.ctc import transcripts_digest
from student_trainer.evaluate import WordDecoding, evaluate_dataset, evaluate_run, evaluation_name
from student_trainer.run_folder import DECODER, RunFolder
from student_trainer.shared_features import SharedFeatures
from student_trainer.sweep_config import ENSEMBLE, EvaluateConfig, Sweep
from student_trainer.token_errors import against_transcripts
from student_trainer.train import train

LOG = "log.txt"
ENSEMBLE_RESULT = f"{ENSEMBLE}.json"


def train_and_evaluate(config: TrainConfig, settings: EvaluateConfig, features: Path | None = None) -> None:
    """Raises what training and evaluation raise; all that they print goes to ``log.txt`` in the run's folder.

    Args:
        features: folder in which the runs of a sweep leave their features for each other.
    """
    folder = Path(config.output)
    shared = None if features is None else SharedFeatures(features, config.training.pool_seconds)
    with _logged(folder / LOG):
        if not train(config, shared) and _is_evaluated(config, settings):
            return
        if settings.graph is not None:
            from student_trainer.tune import tune_run

            tune_run(folder, config.corpus.manifest, config.corpus.dev_splits, settings.graph, None, shared)
        decoding = _decoding(settings, folder / DECODER)
        evaluate_run(folder, config.corpus.manifest, settings.splits, None, decoding, shared)


def evaluate_ensemble(sweep: Sweep) -> str | None:
    """The file with the ensemble's evaluation, made anew: its dataset may have changed. None where the sweep names none."""
    settings = sweep.evaluate
    if settings.ensemble is None:
        return None
    decoder, output = sweep.output / f"{ENSEMBLE}-{DECODER}", sweep.output / ENSEMBLE_RESULT
    if settings.graph is not None and settings.dev_ensemble is not None:
        from student_trainer.tune import tune_dataset

        tune_dataset(settings.dev_ensemble, sweep.manifest, sweep.dev_splits, settings.graph, str(decoder))
    decoding = _decoding(settings, decoder)
    evaluate_dataset(settings.ensemble, sweep.manifest, settings.splits, str(output), decoding, sweep.units)
    return str(output)


def _decoding(settings: EvaluateConfig, decoder: Path) -> WordDecoding | None:
    return None if settings.graph is None else WordDecoding(graph=settings.graph, settings=str(decoder))


def _is_evaluated(config: TrainConfig, settings: EvaluateConfig) -> bool:
    """As it would be now: of the weights that the run ended with, on the same speech, and with the same graph, by settings that
    were chosen on the same dev speech."""
    folder, name = RunFolder(config.output), evaluation_name(settings.splits)
    if not (folder.path / name).exists():
        return False
    whole_corpus = load_corpus(config.corpus.manifest)
    corpus = whole_corpus.select_splits(settings.splits)
    expected = {
        "weights_digest": folder.weights_digest(),
        "splits": list(settings.splits),
        "corpus_digest": corpus.digest,
    }
    if config.ctc is not None:
        expected |= against_transcripts(corpus, config.ctc.units)
    if settings.graph is not None:
        # Here: only decoding needs the decoder's libraries.
        from student_trainer.graph_folder import load_description

        if not (folder.path / DECODER).exists():
            return False
        graph_digest, tuned = load_description(settings.graph).digest(), folder.read_json(DECODER)
        dev_corpus = whole_corpus.select_splits(config.corpus.dev_splits)
        chosen_on = {
            "splits": list(config.corpus.dev_splits),
            "corpus_digest": dev_corpus.digest,
            "transcripts_digest": transcripts_digest(dev_corpus),
            "graph_digest": graph_digest,
        }
        if not _has(tuned, chosen_on):
            return False
        # Not those of before, where tuning was the last that was done.
        expected |= {"decoder": tuned["settings"]}
        expected |= {"graph_digest": graph_digest, "transcripts_digest": transcripts_digest(corpus)}
    return _has(folder.read_json(name), expected)


def _has(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return all(found.get(key) == value for key, value in expected.items())


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            yield
        except Exception:
            traceback.print_exc()
            raise
