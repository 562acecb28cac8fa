"""Run folders and evaluations as training and evaluation leave them, with errors that can be added up by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from student_trainer.config import TrainConfig
from student_trainer.run_folder import RunFolder
from tests.support.datasets import INVENTORY

# Four utterances, 500 frames.
FRAMES = (100, 200, 100, 100)
# Wrong frames of each utterance, for each seed: 40, 42, 44% of all frames; 30, 31, 32%.
HARD = ((50, 70, 40, 40), (50, 80, 40, 40), (50, 90, 40, 40))
SOFT = ((30, 60, 30, 30), (30, 65, 30, 30), (30, 70, 30, 30))
ENSEMBLE = (25, 50, 25, 25)


def evaluation(name: str, errors: Sequence[int], *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "student",
        "name": name,
        "splits": ["test"],
        "corpus_digest": "c" * 64,
        "inventory_digest": INVENTORY.digest(),
        "num_utterances": len(FRAMES),
        "num_frames": sum(FRAMES),
        "frame_error_rate": 100 * sum(errors) / sum(FRAMES),
        "phone_error_rate": 50.0 + seed,
        "cross_entropy": 1.5 + seed / 4,
        "calibration_error": 3.0,
        # None: a label whose probability is not known, as in evaluations of stored targets.
        "utterances": [
            {"utterance_id": f"utt-{index}", "frames": frames, "frame_errors": wrong, "cross_entropy_sum": None}
            for index, (frames, wrong) in enumerate(zip(FRAMES, errors, strict=True))
        ],
        **changes,
    }


def write_run(
    path: Path,
    name: str,
    errors: Sequence[int],
    *,
    seed: int = 0,
    dataset: str | None = None,
    training: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    ctc: dict[str, Any] | None = None,
    num_epochs: int = 3,
    **changes: Any,
) -> str:
    """A run folder as training and evaluation leave it; ``dataset`` makes it one with soft labels."""
    config = TrainConfig.model_validate(
        {
            "name": name,
            "output": str(path),
            "seed": seed,
            "corpus": {"manifest": "corpus.parquet", "inventory": "inventory.json"},
            "soft_labels": {"url": "labels", "weight": 0.8} if dataset else None,
            "ctc": ctc,
            "model": model or {"architecture": "tdnn", "arguments": {"hidden": 64}},
            "training": {"epochs": 3, "batch_seconds": 40.0, **(training or {})},
        }
    )
    run = {
        "config": config.model_dump(mode="json"),
        "corpus_digest": "a" * 64,
        "inventory_digest": INVENTORY.digest(),
        "dataset_digest": dataset,
        "num_parameters": 123_456,
        "history": [
            {"epoch": epoch, "seconds": 1.0, "hard_loss": 2.0, "dev": {"frame_error_rate": 60.0 - 5 * epoch + seed}}
            for epoch in range(1, num_epochs + 1)
        ],
        **changes,
    }
    folder = RunFolder(path)
    folder.write_json("run.json", run)
    folder.write_json("evaluation-test.json", evaluation(name, errors, seed=seed))
    return str(path)


# Of CTC: tokens and words of the same utterances, 100 and 50.
TOKENS = (20, 40, 20, 20)
WORDS = (10, 20, 10, 10)
# Wrong tokens of each utterance, for each seed: 40 and 42%; 30 and 28%; for the ensemble 20%.
HARD_TOKENS = ((10, 14, 8, 8), (10, 16, 8, 8))
SOFT_TOKENS = ((6, 12, 6, 6), (6, 10, 6, 6))
ENSEMBLE_TOKENS = (4, 8, 4, 4)


def ctc_evaluation(name: str, errors: Sequence[int], *, units: str = "characters", **changes: Any) -> dict[str, Any]:
    """One of CTC; of characters, half as many words are wrong as tokens."""
    utterances = [
        {"utterance_id": f"utt-{index}", "frames": 100 + index, "tokens": tokens, "token_errors": wrong}
        | ({"words": words, "word_errors": wrong // 2} if units == "characters" else {})
        for index, (tokens, words, wrong) in enumerate(zip(TOKENS, WORDS, errors, strict=True))
    ]
    found = {
        "kind": "student",
        "name": name,
        "splits": ["test"],
        "corpus_digest": "c" * 64,
        "inventory_digest": INVENTORY.digest(),
        "units": units,
        "transcripts_digest": "d" * 64,
        "token_error_rate": 100 * sum(errors) / sum(TOKENS),
        "utterances": utterances,
    }
    if units == "characters":
        found["word_error_rate"] = 100 * sum(wrong // 2 for wrong in errors) / sum(WORDS)
    return found | changes


def write_ctc_run(
    path: Path,
    name: str,
    errors: Sequence[int],
    *,
    seed: int = 0,
    dataset: str | None = None,
    units: str = "characters",
    **changes: Any,
) -> str:
    """As ``write_run``; dev token errors of 40, 30 and 20% after three epochs."""
    history = [{"epoch": epoch, "dev": {"token_error_rate": 50.0 - 10 * epoch}} for epoch in (1, 2, 3)]
    of_ctc = {"transcripts_digest": "b" * 64, "history": history} | changes
    run = write_run(path, name, HARD[0], seed=seed, dataset=dataset, ctc={"units": units}, **of_ctc)
    RunFolder(path).write_json("evaluation-test.json", ctc_evaluation(name, errors, units=units))
    return run
