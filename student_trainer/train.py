"""The training loop: hard cross-entropy and sparse soft loss, resumable to the same result.

Everything random is a function of (seed, epoch, step): the order of the batches, and dropout, whose generator is seeded
anew at each step. A checkpoint therefore holds no generator state, and a run that was killed and resumed ends with
the same weights as one that was not.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from softlabel_schemas.command_line import progress
from softlabel_schemas.corpus import Corpus, check_hard_labels, load_corpus
from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory
from student_trainer.config import TrainConfig
from student_trainer.data import Batch, Pool, SoftLabels, TrainingData, collate
from student_trainer.evaluate import check_lengths, load_evaluation_corpus, model_posteriors
from student_trainer.loss import hard_loss, soft_loss
from student_trainer.metrics import Metrics
from student_trainer.models import ENCODERS, AcousticModel
from student_trainer.run_folder import RUN, TENSORBOARD, RunFolder, build_model, set_threads


@dataclass(slots=True)
class Progress:
    """Where a run stands; all of it goes into the checkpoint."""

    epoch: int = 0
    step: int = 0
    loss_sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    best_dev: float = math.inf
    history: list[dict[str, Any]] = field(default_factory=list)


def train(config: TrainConfig) -> bool:
    """Train or resume; returns False where the run was complete already.

    Raises:
        InputError: inputs do not fit together, or the output folder holds a run of another configuration.
    """
    set_threads(config.training.num_threads)
    inventory = ClassInventory.load(config.corpus.inventory)
    corpus = load_corpus(config.corpus.manifest)
    train_corpus = corpus.select_splits(config.corpus.train_splits)
    check_hard_labels(train_corpus, inventory, where=config.corpus.manifest)
    _check_frame_shift(train_corpus, config)
    soft_labels, dataset_digest = _open_soft_labels(config, train_corpus, inventory)
    folder = RunFolder(config.output)
    torch.manual_seed(config.seed)
    model = build_model(config, inventory)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.training.learning_rate, weight_decay=config.training.weight_decay
    )
    identity = {
        "config": config.model_dump(mode="json"),
        "config_digest": config.digest(),
        "corpus_digest": train_corpus.digest,
        "inventory_digest": inventory.digest(),
        "dataset_digest": dataset_digest,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    at = _resume(folder, identity, model, optimizer)
    if at.epoch >= config.training.epochs:
        return False
    dev = None
    if config.corpus.dev_splits:
        dev_corpus = load_evaluation_corpus(config.corpus.manifest, config.corpus.dev_splits, inventory)
        dev = TrainingData(dev_corpus, config.front_end, None)
    folder.write_inventory(inventory)
    trainer = _Trainer(config, folder, identity, model, optimizer, at)
    trainer.run(TrainingData(train_corpus, config.front_end, soft_labels), dev, inventory)
    return True


class _Trainer:
    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        identity: dict[str, Any],
        model: AcousticModel,
        optimizer: torch.optim.Optimizer,
        at: Progress,
    ) -> None:
        self.config, self.folder, self.identity = config, folder, identity
        self.model, self.optimizer, self.at = model, optimizer, at
        self.last_checkpoint = time.monotonic()

    def run(self, data: TrainingData, dev: TrainingData | None, inventory: ClassInventory) -> None:
        settings, at = self.config.training, self.at
        pools = data.pools(
            seed=self.config.seed,
            first_epoch=at.epoch,
            num_epochs=settings.epochs,
            batch_seconds=settings.batch_seconds,
            pool_seconds=settings.pool_seconds,
        )
        seconds = float(data.seconds_N.sum())
        with progress(f"train {self.config.name}", settings.epochs * seconds, "s of speech") as advance:
            advance(at.epoch * seconds)
            for pool in pools:
                self._train_pool(pool, lambda epochs_done: advance(epochs_done * seconds))
                if pool.ends_epoch:
                    self._epoch_end(dev, inventory)
                    advance(at.epoch * seconds, _note(at.history[-1]))

    def _train_pool(self, pool: Pool, advance: Callable[[float], None]) -> None:
        """The steps of one pool, less those done before the checkpoint that was resumed."""
        at, started = self.at, time.monotonic()
        temperature = self.config.soft_labels.temperature if self.config.soft_labels else 1.0
        for step, rows in enumerate(pool.batches, start=pool.first_step):
            if step < at.step:
                continue
            batch = collate([pool.examples[row] for row in rows], temperature=temperature)
            losses = self._step(batch, pool.epoch + step / pool.num_steps)
            for name, value in losses.items():
                at.loss_sums[name] = at.loss_sums.get(name, 0.0) + value
            at.step = step + 1
            now = time.monotonic()
            at.seconds, started = at.seconds + now - started, now
            advance(pool.epoch + at.step / pool.num_steps)
            if now - self.last_checkpoint > 60 * self.config.training.checkpoint_minutes:
                self._checkpoint()

    def _step(self, batch: Batch, epochs_done: float) -> dict[str, float]:
        config, soft = self.config, self.config.soft_labels
        # Dropout as a function of (seed, epoch, step).
        torch.manual_seed(int(np.random.SeedSequence([config.seed, self.at.epoch, self.at.step]).generate_state(1)[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, epochs_done)
        self.model.train()
        logits, lengths_B = self.model.all_heads(batch.features_BTD, batch.lengths_B)
        check_lengths(batch, lengths_B)
        mask_BT = torch.arange(logits[0].shape[1])[None, :] < lengths_B[:, None]
        hard_NV = logits[0][mask_BT]
        hard = hard_loss(hard_NV, batch.labels_N)
        loss, losses = hard, {"hard_loss": float(hard.detach())}
        if soft is not None:
            assert batch.targets is not None
            soft_NV = hard_NV if len(logits) == 1 else logits[1][mask_BT]
            distillation = soft_loss(
                soft_NV, batch.targets, temperature=soft.temperature, tail=soft.tail, labels_N=batch.labels_N
            )
            losses["soft_loss"] = float(distillation.detach())
            loss = (1 - soft.weight) * hard + soft.weight * distillation
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {float(loss.detach())} at epoch {self.at.epoch + 1}, step {self.at.step} "
                f"(utterances {', '.join(batch.utterance_ids[:3])}, ...); lower training.learning_rate or check the data"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(self.model.parameters(), config.training.gradient_clip)
        self.optimizer.step()
        return losses

    def _epoch_end(self, dev: TrainingData | None, inventory: ClassInventory) -> None:
        at = self.at
        record: dict[str, Any] = {"epoch": at.epoch + 1, "steps": at.step, "seconds": at.seconds}
        record |= {name: value / max(at.step, 1) for name, value in at.loss_sums.items()}
        better = True
        if dev is not None:
            self.model.eval()
            metrics = Metrics(inventory)
            for labelled, posteriors in model_posteriors(self.model, dev):
                for (utterance_id, labels_T), found in zip(labelled, posteriors, strict=True):
                    metrics.add(utterance_id, labels_T, found)
            record["dev"] = metrics.summary()
            better = record["dev"]["frame_error_rate"] < at.best_dev
            at.best_dev = min(at.best_dev, record["dev"]["frame_error_rate"])
        at.history.append(record)
        at.epoch, at.step, at.loss_sums, at.seconds = at.epoch + 1, 0, {}, 0.0
        # Checkpoint last: killed before it, the epoch is trained again to the same files.
        if better:
            self.folder.write_model(self.model)
        self.folder.write_json(RUN, {**self.identity, "history": at.history})
        _log_to_tensorboard(self.folder, at.history)
        self._checkpoint()

    def _checkpoint(self) -> None:
        at, self.last_checkpoint = self.at, time.monotonic()
        self.folder.write_checkpoint(
            {
                "identity": self.identity,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": {name: getattr(at, name) for name in Progress.__dataclass_fields__},
            }
        )


def learning_rate(config: TrainConfig, epochs_done: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    done = epochs_done / config.training.epochs
    warmup = config.training.warmup
    if done < warmup:
        return config.training.learning_rate * max(done / warmup, 0.01)
    return config.training.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _note(record: dict[str, Any]) -> str:
    dev = f", dev frame error {record['dev']['frame_error_rate']:.2f}%" if "dev" in record else ""
    return f"epoch {record['epoch']}: hard loss {record['hard_loss']:.3f}{dev}"


def _check_frame_shift(corpus: Corpus, config: TrainConfig) -> None:
    labels, features = corpus.hard_label_frame_shift_ms, config.front_end.output_frame_shift_ms
    if labels is not None and config.model.architecture in ENCODERS and labels != features:
        raise InputError(
            f"hard labels have a frame shift of {labels:g} ms, the front end gives {features:g} ms; "
            "set front_end.stack (or frame_shift_ms) so that they agree"
        )


def _open_soft_labels(
    config: TrainConfig, corpus: Corpus, inventory: ClassInventory
) -> tuple[SoftLabels | None, str | None]:
    if config.soft_labels is None:
        return None, None
    dataset = open_dataset(config.soft_labels.url)
    soft_labels = SoftLabels(dataset, config.soft_labels, corpus, inventory.digest())
    return soft_labels, dataset.manifest.content_digest


def _resume(
    folder: RunFolder, identity: dict[str, Any], model: AcousticModel, optimizer: torch.optim.Optimizer
) -> Progress:
    state = folder.read_checkpoint()
    if state is None:
        return Progress()
    for key in ("config_digest", "corpus_digest", "inventory_digest", "dataset_digest"):
        if state["identity"][key] != identity[key]:
            raise InputError(
                f"{folder.path} holds a run with another {key} ({state['identity'][key]}, now {identity[key]}); "
                "use another output folder or delete that one"
            )
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        # The code of a user's own encoder is not part of the digest.
        raise InputError(
            f"{folder.path}: the checkpoint does not fit the model ({error}); use another output folder"
        ) from None
    return Progress(**state["progress"])


def _log_to_tensorboard(folder: RunFolder, history: list[dict[str, Any]]) -> None:
    """The last epoch's scalars; steps are epochs."""
    with warnings.catch_warnings():
        # tensorboard's protobuf classes warn about their own deprecations on import.
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter
    record = history[-1]
    with SummaryWriter(str(folder.path / TENSORBOARD)) as writer:
        for name, value in {**record, **record.get("dev", {})}.items():
            if isinstance(value, int | float) and name != "epoch":
                writer.add_scalar(name, value, record["epoch"])
