"""A checkpoint names what it was made from, and a damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabel_schemas import IntegrityError, open_dataset
from softlabel_schemas.object_store import ObjectStore
from student_trainer.config import TrainConfig
from student_trainer.run_folder import RunFolder
from student_trainer.train import train
from tests.support.speech import INVENTORY, SoftDataset, Speech, train_config
from tests.support.trainings import checkpoint


@pytest.fixture(scope="module")
def trained(speech: Speech, labels: SoftDataset) -> TrainConfig:
    config = train_config(speech, speech.folder / "trained", url=labels.url)
    assert train(config)
    return config


class TestCheckpoint:
    def test_names_all_it_was_made_from(self, speech: Speech, labels: SoftDataset, trained: TrainConfig) -> None:
        identity = checkpoint(trained)["identity"]
        assert TrainConfig.model_validate(identity["config"]) == trained
        assert identity["dataset_digest"] == open_dataset(labels.url).manifest.content_digest
        assert identity["inventory_digest"] == INVENTORY.digest()
        assert identity["corpus_digest"] == speech.corpus.select_splits(["train"]).digest
        run = json.loads((Path(trained.output) / "run.json").read_bytes())
        assert {name: run[name] for name in identity} == identity
        model, config, inventory = RunFolder(trained.output).load_model()
        assert (config, inventory) == (trained, INVENTORY)
        assert identity["num_parameters"] == sum(value.numel() for value in model.state_dict().values())

    @pytest.mark.parametrize("damage", ["truncated", "empty", "not an archive", "a tensor's bit", "not a checkpoint"])
    def test_a_damaged_one_is_refused(self, trained: TrainConfig, tmp_path: Path, damage: str) -> None:
        data = bytearray((Path(trained.output) / "checkpoint.pt").read_bytes())
        weight = checkpoint(trained)["model"]["heads.0.weight"].numpy().tobytes()
        if damage == "a tensor's bit":
            data[data.index(weight) + len(weight) // 2] ^= 1
        damaged = {"truncated": data[: len(data) // 2], "empty": b"", "not an archive": b"x" * 1000}.get(damage, data)
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        if damage == "not a checkpoint":
            torch.save({"weights": torch.zeros(2)}, tmp_path / "checkpoint.pt")
        config = trained.model_copy(update={"output": str(tmp_path)})
        with pytest.raises(
            IntegrityError, match=r"checkpoint\.pt cannot be read .*; delete it to train from the start"
        ):
            train(config)

    @pytest.mark.parametrize(
        ("owner", "name", "error"),
        [(ObjectStore, "read", OSError("Input/output error")), (torch, "load", MemoryError("no room"))],
    )
    def test_what_the_disk_or_the_machine_lacks_is_no_damage(
        self, trained: TrainConfig, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception
    ) -> None:
        """And no reason to delete it."""

        def failing(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(owner, name, failing)
        with pytest.raises(type(error), match=str(error)):
            RunFolder(trained.output).read_checkpoint()

    def test_no_flipped_bit_is_read_silently(self, trained: TrainConfig, tmp_path: Path) -> None:
        data = (Path(trained.output) / "checkpoint.pt").read_bytes()
        expected = checkpoint(trained)
        rng = np.random.default_rng(0)
        detected = 0
        for bit in rng.integers(0, 8 * len(data), 100):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << (bit % 8)
            (tmp_path / "checkpoint.pt").write_bytes(flipped)
            try:
                found = RunFolder(tmp_path).read_checkpoint()
            except IntegrityError:
                detected += 1
                continue
            # Alignment between records and repeated headers are not read.
            assert found is not None
            assert str(found) == str(expected)
        assert detected > 50
