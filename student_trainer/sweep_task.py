"""One run of a sweep, as a Ray task makes it: train, choose the decoder's settings, evaluate. Knows nothing of Ray.

Each step passes over what is done, so that a task that is run again goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from student_trainer.config import TrainConfig
from student_trainer.evaluate import WordDecoding, evaluate_dataset, evaluate_run, evaluation_name
from student_trainer.run_folder import DECODER, RunFolder
from student_trainer.sweep_config import ENSEMBLE, EvaluateConfig, Sweep
from student_trainer.train import train

LOG = "log.txt"
ENSEMBLE_RESULT = f"{ENSEMBLE}.json"


def train_and_evaluate(config: TrainConfig, settings: EvaluateConfig) -> None:
    """Raises what training and evaluation raise; all that they print goes to ``log.txt`` in the run's folder."""
    folder = Path(config.output)
    with _logged(folder / LOG):
        if not train(config) and _is_evaluated(RunFolder(folder), settings):
            return
        if settings.graph is not None:
            from student_trainer.tune import tune_run

            tune_run(folder, config.corpus.manifest, config.corpus.dev_splits, settings.graph, None)
        decoding = _decoding(settings, folder / DECODER)
        evaluate_run(folder, config.corpus.manifest, settings.splits, None, decoding)


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


def _is_evaluated(folder: RunFolder, settings: EvaluateConfig) -> bool:
    """With the weights that the run ended with, and words included, where the sweep asks for them."""
    name = evaluation_name(settings.splits)
    if not (folder.path / name).exists():
        return False
    evaluation = folder.read_json(name)
    if evaluation.get("weights_digest") != folder.weights_digest():
        return False
    return settings.graph is None or evaluation.get("word_error_rate") is not None


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
