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
        # NaN: a label whose probability is not known, as in evaluations of stored targets.
        "utterances": [
            {"utterance_id": f"utt-{index}", "frames": frames, "frame_errors": wrong, "cross_entropy_sum": float("nan")}
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
            "model": model or {"architecture": "tdnn", "arguments": {"hidden": 64}},
            "training": {"epochs": 3, "batch_seconds": 40.0, **(training or {})},
        }
    )
    run = {
        "config": config.model_dump(mode="json"),
        "config_digest": config.digest(),
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
