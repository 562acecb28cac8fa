"""The folder of a training run.

    run/
      run.json           configuration, digests (corpus, inventory, dataset), what was left out, history of every epoch
      checkpoint.pt      everything needed to go on; loaded without pickle (weights_only)
      model.safetensors  weights of the best epoch on the dev splits, or of the last where there are none
      inventory.json     the class inventory of the outputs
      evaluation-*.json  written by ``student-trainer evaluate``
      decoder.json       settings of the word decoder, written by ``student-trainer tune-decoder``
      training.id        which training was begun here last
      tensorboard/

Every file is written beside its name and renamed, so that a kill leaves the old or the new one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.strict import parse
from student_trainer.config import TrainConfig
from student_trainer.models import AcousticModel, build_acoustic_model

RUN = "run.json"
CHECKPOINT = "checkpoint.pt"
MODEL = "model.safetensors"
INVENTORY = "inventory.json"
DECODER = "decoder.json"
_DIGEST = "sha256"
TENSORBOARD = "tensorboard"
CLAIM = "training.id"
_CHECKPOINT_KEYS = {"identity", "model", "optimizer", "progress"}


class RunFolder:
    """Reads and writes the files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._store = ObjectStore(self.path)
        self._claim = b""

    def claim(self) -> None:
        """Make this training the folder's. One that has claimed it before is ended by :meth:`check_claim`."""
        self._claim = uuid.uuid4().hex.encode()
        self._store.put(CLAIM, self._claim)

    def check_claim(self) -> None:
        """Before anything is written: of two trainings, the settings of one would stand beside the weights of the other. No
        lock: on some shared disks that of a lost node outlasts it, and a node that is lost to Ray alone may go on writing.

        Raises:
            InputError: another training has claimed the folder since.
        """
        if self._store.read(CLAIM) != self._claim:
            raise InputError(
                f"another training was begun in {self.path} after this one, and has the folder now; this one ends. For both, "
                "give each an output folder of its own"
            )

    def write_json(self, name: str, value: Any) -> None:
        self._store.put(name, json.dumps(value, indent=1).encode())

    def read_json(self, name: str) -> Any:
        """Raises InputError where the file is missing, IntegrityError where it is not JSON."""
        try:
            return json.loads(self._store.read(name))
        except FileNotFoundError:
            raise InputError(f"{self.path} is not a training run: {name} does not exist") from None
        except ValueError as error:
            raise IntegrityError(f"{self.path / name} is not JSON: {error}") from None

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._store.put(CHECKPOINT, buffer.getvalue())

    def read_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None; its tensors are on the CPU.

        Raises:
            IntegrityError: it is damaged.
            OSError, MemoryError: of the disk or the machine, not of the file: it may be read another time.
        """
        try:
            # In memory, as it was written: an OSError from within a damaged archive would pass for the disk's.
            data = self._store.read(CHECKPOINT)
        except FileNotFoundError:
            return None
        try:
            # torch.load does not compare the archive's checksums.
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} does not have its checksum")
            state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if set(state) != _CHECKPOINT_KEYS:
                raise ValueError(f"it has the keys {sorted(state)}, expected {sorted(_CHECKPOINT_KEYS)}")
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - torch raises many types for a damaged file
            where = self.path / CHECKPOINT
            raise IntegrityError(f"{where} cannot be read ({error}); delete it to train from the start") from None
        return state

    def write_model(self, model: AcousticModel) -> None:
        weights = weights_of(model)
        self._store.put(MODEL, safetensors.torch.save(weights, metadata={_DIGEST: _weights_digest(weights)}))

    def write_inventory(self, inventory: ClassInventory) -> None:
        self._store.put(INVENTORY, inventory.to_json())

    def log_to_tensorboard(self, record: Mapping[str, Any]) -> None:
        """The scalars of one epoch of the history; steps are epochs."""
        with warnings.catch_warnings():
            # tensorboard's protobuf classes warn about their own deprecations on import.
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
        with SummaryWriter(str(self.path / TENSORBOARD)) as writer:
            for name, value in {**record, **record.get("dev", {})}.items():
                if isinstance(value, int | float) and name != "epoch":
                    writer.add_scalar(name, value, record["epoch"])

    def config(self) -> TrainConfig:
        return parse(TrainConfig, self.read_json(RUN)["config"], where=f"{self.path / RUN} (config)")

    def unfinished(self) -> str | None:
        """Such as "has trained 2 of 8 epochs"; None of a run that is complete."""
        done, epochs = len(self.read_json(RUN)["history"]), self.config().training.epochs
        return None if done >= epochs else f"has trained {done} of {epochs} epochs"

    def inventory(self) -> ClassInventory:
        return ClassInventory.load(self.path / INVENTORY)

    def weights_digest(self) -> str | None:
        """Of the model as its file names it, which :meth:`load_model` verifies; None where there is no model."""
        try:
            with safetensors.safe_open(self.path / MODEL, framework="pt") as file:
                return (file.metadata() or {}).get(_DIGEST)
        except FileNotFoundError:
            return None
        except safetensors.SafetensorError as error:
            raise IntegrityError(f"{self.path / MODEL} cannot be read: {error}") from None

    def load_model(self) -> tuple[AcousticModel, TrainConfig, ClassInventory]:
        """The trained model in evaluation mode, on the CPU. Raises InputError, IntegrityError."""
        config, inventory = self.config(), self.inventory()
        model = build_model(config, inventory)
        try:
            with safetensors.safe_open(self.path / MODEL, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                expected = (file.metadata() or {}).get(_DIGEST)
            if _weights_digest(weights) != expected:
                raise IntegrityError(
                    f"{self.path / MODEL} was changed after writing: its weights do not have their digest"
                )
            model.load_state_dict(weights)
        except FileNotFoundError:
            raise InputError(f"{self.path} holds no trained model yet ({MODEL} does not exist)") from None
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise IntegrityError(f"{self.path / MODEL} does not fit the run's configuration: {error}") from None
        return model.eval(), config, inventory


def build_model(config: TrainConfig, inventory: ClassInventory) -> AcousticModel:
    return build_acoustic_model(
        architecture=config.model.architecture,
        num_features=config.front_end.num_features,
        num_classes=inventory.num_classes,
        num_heads=config.soft_labels.num_heads if config.soft_labels else 1,
        arguments=dict(config.model.arguments),
    )


def weights_of(model: AcousticModel) -> dict[str, torch.Tensor]:
    """By name, on the CPU, in memory of their own: safetensors refuses what is shared, as tied weights are."""
    return {name: tensor.cpu().contiguous().clone() for name, tensor in model.state_dict().items()}


def _weights_digest(weights: dict[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes: safetensors has no checksum of its own."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def set_threads(num_threads: int | None) -> None:
    """Fix the number of threads: float sums depend on it, and so does resuming to the same result."""
    torch.set_num_threads(num_threads or len(os.sched_getaffinity(0)))
