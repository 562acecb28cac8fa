"""The training loop: hard cross-entropy and sparse soft loss, resumable to the same result.

Everything random is a function of (seed, epoch, step): the order of the batches, augmentation (by utterance), and
dropout, whose generator is seeded anew at each step. A checkpoint therefore holds no generator state, and a run that
was killed and resumed ends with the same weights as one that was not; on a GPU up to rounding, as its sums have no fixed order.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from softlabel_schemas.command_line import progress
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.strict import parse
from student_trainer.arms import unlike_settings
from student_trainer.batch import Batch
from student_trainer.config import TrainConfig
from student_trainer.ctc import check_long_enough, ctc_loss, transcripts_digest
from student_trainer.data import Step, TrainingData
from student_trainer.device import training_device, warn_of_slow_precision
from student_trainer.evaluate import check_lengths, model_posteriors
from student_trainer.hard_labels import check_label_frames
from student_trainer.inputs import Inputs, open_dev, open_inputs
from student_trainer.interrupts import interrupts_held
from student_trainer.left_out import say_what_is_left_out, to_json
from student_trainer.loss import hard_and_soft_loss, hard_loss, soft_loss
from student_trainer.metrics import Metrics
from student_trainer.models import AcousticModel
from student_trainer.order import Order
from student_trainer.processes import is_lost_process, steps_of_processes
from student_trainer.result_files import flat_settings
from student_trainer.run_folder import CHECKPOINT, RUN, RunFolder, build_model, set_threads
from student_trainer.schedule import learning_rate, soft_weight
from student_trainer.shared_features import SharedFeatures
from student_trainer.source import TrainingSource
from student_trainer.token_errors import token_metrics

# Of a run's identity, to be compared where it goes on; the last four are there where the run has a use for them.
_DIGESTS = (
    "corpus_digest",
    "inventory_digest",
    "dataset_digest",
    "transcripts_digest",
    "hard_labels_digest",
    "dev_corpus_digest",
    "dev_transcripts_digest",
)


@dataclass(slots=True)
class Progress:
    """Where a run stands; all of it goes into the checkpoint.

    Attributes:
        loss_sums, loss_steps: of each loss in this epoch, over the steps that had it, and how many these are.
    """

    epoch: int = 0
    step: int = 0
    loss_sums: dict[str, float] = field(default_factory=dict)
    loss_steps: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    best_dev: float = math.inf
    history: list[dict[str, Any]] = field(default_factory=list)


def train(config: TrainConfig, shared: SharedFeatures | None = None) -> bool:
    """Train or resume; returns False where the run was complete already.

    Args:
        shared: features that runs of the same speech leave for each other.

    Raises:
        InputError: inputs do not fit together, the output folder holds a run of another configuration, or another training was
            begun there meanwhile.
    """
    set_threads(config.training.num_threads)
    device = training_device(config.training.device)
    inputs = open_inputs(config, shared)
    # Not with the inputs: a loop of one's own may have a model that gives other frames.
    check_label_frames(inputs.data.corpus, config, where=config.corpus.manifest)
    inventory = inputs.inventory
    blank = None if config.ctc is None else inventory.blank_id
    folder = RunFolder(config.output)
    torch.manual_seed(config.seed)
    # Initialised on the CPU, so that a seed means the same weights everywhere.
    model = build_model(config, inventory).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.training.learning_rate, weight_decay=config.training.weight_decay
    )
    identity = {
        "config": config.model_dump(mode="json"),
        "corpus_digest": inputs.corpus.digest,
        "inventory_digest": inventory.digest(),
        "dataset_digest": _digest(inputs.datasets),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    dev = open_dev(config, inventory, shared)
    identity |= {name: digest for name, digest in _further_digests(inputs, dev).items() if digest is not None}
    at = _resume(folder, identity, model, optimizer)
    if at.epoch >= config.training.epochs:
        return False
    folder.claim()
    warn_of_slow_precision(config.training)
    for url, skipped in inputs.left_out.items():
        say_what_is_left_out(skipped, len(inputs.corpus), where=f"{folder.path}/{RUN}", url=url)
    folder.write_inventory(inventory)
    left_out = [entry for skipped in inputs.left_out.values() for entry in skipped]
    _Trainer(config, folder, identity, left_out, model, optimizer, at, blank).run(
        TrainingSource(config, inputs), dev, inventory
    )
    return True


class _Trainer:
    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        identity: dict[str, Any],
        left_out: Sequence[SkippedUtterance],
        model: AcousticModel,
        optimizer: torch.optim.Optimizer,
        at: Progress,
        blank: int | None = None,
    ) -> None:
        """``blank``: CTC's, where transcripts are the hard labels."""
        self.config, self.folder, self.identity, self.left_out = config, folder, identity, left_out
        self.model, self.optimizer, self.at = model, optimizer, at
        self.device, self.blank = next(model.parameters()).device, blank
        self.last_checkpoint = self.last_step = time.monotonic()
        self.saved = (at.epoch, at.step)
        # Whether the weights are those of ``at``: not so within a step.
        self.is_whole = True

    def run(self, source: TrainingSource, dev: TrainingData | None, inventory: ClassInventory) -> None:
        """Raises OSError, IntegrityError or KeyboardInterrupt after writing a checkpoint, so that no step is lost; InputError
        where there is not enough memory, for a checkpoint either."""
        try:
            self._run(source, dev, inventory)
        except (OSError, IntegrityError, KeyboardInterrupt):
            self._save_before_leaving()
            raise
        except (MemoryError, RuntimeError) as error:
            if is_lost_process(error):
                self._save_before_leaving()
                raise ChildProcessError(_lost(error, self.config)) from error
            if not _is_out_of_memory(error):
                raise
            raise InputError(self._out_of_memory(error)) from error

    def _run(self, source: TrainingSource, dev: TrainingData | None, inventory: ClassInventory) -> None:
        settings, at, data = self.config.training, self.at, source.data
        order = Order(seed=self.config.seed, batch_seconds=settings.batch_seconds, pool_seconds=settings.pool_seconds)
        seconds = float(data.seconds_N.sum())
        with progress(f"train {self.config.name}", settings.epochs * seconds, "s of speech") as advance:
            advance(at.epoch * seconds)
            if at.step and at.step == data.num_steps(order, at.epoch):
                # Interrupted after the last step of an epoch, before its end.
                self._epoch_end(dev, inventory)
            with contextlib.closing(self._steps(source, order)) as steps:
                self.last_step = time.monotonic()
                for step in steps:
                    self._take(step)
                    advance((step.epoch + at.step / step.num_steps) * seconds)
                    if step.ends_epoch:
                        self._epoch_end(dev, inventory)
                        advance(at.epoch * seconds, _note(at.history[-1], _dev_metric(self.config)))
                        self.last_step = time.monotonic()

    def _steps(self, source: TrainingSource, order: Order) -> Generator[Step, None, None]:
        settings, data = self.config.training, source.data
        place: dict[str, Any] = {
            "num_epochs": settings.epochs,
            "first_epoch": self.at.epoch,
            "first_step": self.at.step,
            "device": self.device,
        }
        # A corpus that is kept in memory is made once.
        is_large = float(data.seconds_N.sum()) > settings.pool_seconds
        if settings.num_processes is not None and is_large and self.at.epoch < settings.epochs:
            return steps_of_processes(source, order, num_processes=settings.num_processes, **place)
        return data.steps(order, temperature=source.temperature, **place)

    def _take(self, step: Step) -> None:
        at = self.at
        with self._changing():
            losses = self._step(step.batch, step.epoch + step.step / step.num_steps)
            for name, value in losses.items():
                at.loss_sums[name] = at.loss_sums.get(name, 0.0) + value
                at.loss_steps[name] = at.loss_steps.get(name, 0) + 1
            at.step = step.step + 1
            now = time.monotonic()
            at.seconds += now - self.last_step
            self.last_step = now
        if now - self.last_checkpoint > 60 * self.config.training.checkpoint_minutes:
            self._checkpoint()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Around each change of weights and progress. An exception within leaves them torn, and no checkpoint is written of
        that; Ctrl-C waits for the end."""
        with interrupts_held():
            self.is_whole = False
            yield
            self.is_whole = True

    def _step(self, batch: Batch, epochs_done: float) -> dict[str, float]:
        """The losses of the batch; without the hard loss where it has no hard labels."""
        config, soft = self.config, self.config.soft_labels
        # Dropout as a function of (seed, epoch, step).
        torch.manual_seed(int(np.random.SeedSequence([config.seed, self.at.epoch, self.at.step]).generate_state(1)[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.training, epochs_done)
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.training.precision == "bfloat16"):
            logits, lengths_B = self.model.all_heads(batch.features_BTD, batch.lengths_B)
        # With CTC alone, how many frames there are is the model's own affair.
        if batch.tokens is None or batch.targets is not None:
            check_lengths(batch, lengths_B)
        terms = self._loss_terms([each.float() for each in logits], lengths_B, batch)
        loss = terms["hard_loss"]
        if soft is not None:
            weight = soft_weight(soft, epochs_done / config.training.epochs)
            loss = (1 - weight) * loss + weight * terms["soft_loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_grad_norm_(self.model.parameters(), config.training.gradient_clip)
        # Both at once, and before the weights change: a look at either waits for the GPU.
        if not torch.isfinite(loss.detach() + norm):
            raise InputError(
                f"the loss is {float(loss.detach())}, the norm of its gradient {float(norm)}, at epoch {self.at.epoch + 1}, "
                f"step {self.at.step} (utterances {', '.join(batch.utterance_ids[:3])}, ...); lower training.learning_rate or "
                "check the data"
            )
        self.optimizer.step()
        if not _has_hard_labels(batch):
            # Nothing was learnt from any: the 0 stands for no loss.
            del terms["hard_loss"]
        return {name: float(term.detach()) for name, term in terms.items()}

    def _loss_terms(self, logits: list[Tensor], lengths_B: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The hard loss, and with soft labels the soft loss.

        Args:
            logits: float32 [N, V] of each head; the first head decodes.
        """
        # Of one head the same tensor twice: the losses then share a normalisation.
        soft, hard_NV, soft_NV = self.config.soft_labels, logits[0], logits[-1]
        if soft is None:
            return {"hard_loss": self._hard_loss(hard_NV, lengths_B, batch)}
        if soft.decoding_head == "soft":
            hard_NV, soft_NV = soft_NV, hard_NV
        assert batch.targets is not None
        mode: dict[str, Any] = {"temperature": soft.temperature, "tail": soft.tail, "labels_N": batch.labels_N}
        if self.blank is not None:
            distillation = soft_loss(soft_NV, batch.targets, **mode)
            return {"hard_loss": self._hard_loss(hard_NV, lengths_B, batch), "soft_loss": distillation}
        hard, distillation = hard_and_soft_loss(hard_NV, soft_NV, batch.targets, **mode)
        return {"hard_loss": hard, "soft_loss": distillation}

    def _hard_loss(self, logits_NV: Tensor, lengths_B: Tensor, batch: Batch) -> Tensor:
        if self.blank is None:
            return hard_loss(logits_NV, batch.labels_N)
        if batch.tokens is None:
            return logits_NV.sum() * 0.0
        check_long_enough(batch, lengths_B)
        return ctc_loss(logits_NV, lengths_B, batch.tokens, blank=self.blank)

    def _epoch_end(self, dev: TrainingData | None, inventory: ClassInventory) -> None:
        at = self.at
        record: dict[str, Any] = {"epoch": at.epoch + 1, "steps": at.step, "seconds": at.seconds}
        # 0 where no step had hard labels.
        record |= {"hard_loss": 0.0} | {name: value / at.loss_steps[name] for name, value in at.loss_sums.items()}
        if dev is not None:
            self.model.eval()
            record["dev"] = self._evaluated(dev, inventory)
        with self._changing():
            self.folder.check_claim()
            better = True
            if dev is not None:
                errors = record["dev"][_dev_metric(self.config)]
                better, at.best_dev = errors < at.best_dev, min(at.best_dev, errors)
            at.history.append(record)
            at.epoch, at.step, at.loss_sums, at.loss_steps, at.seconds = at.epoch + 1, 0, {}, {}, 0.0
            # Checkpoint last: killed before it, the epoch is trained again to the same files.
            if better:
                self.folder.write_model(self.model)
            left_out = {"left_out": to_json(self.left_out)}
            self.folder.write_json(RUN, {**self.identity, **left_out, "history": at.history})
            self.folder.log_to_tensorboard(at.history[-1])
            self._checkpoint()

    def _evaluated(self, dev: TrainingData, inventory: ClassInventory) -> dict[str, Any]:
        if dev.spelling is not None:
            return token_metrics(self.model, dev, inventory).summary()
        metrics = Metrics(inventory)
        for labelled, posteriors in model_posteriors(self.model, dev):
            for (utterance_id, labels_T), found in zip(labelled, posteriors, strict=True):
                metrics.add(utterance_id, labels_T, found)
        return metrics.summary()

    def _checkpoint(self) -> None:
        at, self.last_checkpoint = self.at, time.monotonic()
        self.folder.check_claim()
        self.folder.write_checkpoint(
            {
                "identity": self.identity,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": {name: getattr(at, name) for name in Progress.__dataclass_fields__},
            }
        )
        self.saved = (at.epoch, at.step)

    def _out_of_memory(self, error: Exception) -> str:
        settings, (epoch, step) = self.config.training, self.saved
        processes = "" if settings.num_processes is None else f", training.num_processes ({settings.num_processes})"
        # Python's own has no text.
        lines = str(error).splitlines()
        message = (
            f"out of memory at epoch {self.at.epoch + 1}, step {self.at.step}{f' ({lines[0]})' if lines else ''}; lower "
            f"training.batch_seconds ({settings.batch_seconds:g}){processes}, training.pool_seconds "
            f"({settings.pool_seconds:g}: speech that is kept in memory) or the size of the model"
        )
        if self.saved == (0, 0):
            return message
        return (
            f"{message}, in another output folder; or go on where there is more memory: the last checkpoint, of epoch "
            f"{epoch + 1}, step {step}, stays in {self.folder.path}"
        )

    def _save_before_leaving(self) -> None:
        """What leads here may be a full disk: the checkpoint before stands then."""
        if self.is_whole and self.saved != (self.at.epoch, self.at.step):
            try:
                self._checkpoint()
            except (InputError, OSError) as error:
                click.echo(f"no checkpoint could be written: {error}", err=True)
        epoch, step = self.saved
        if self.saved != (0, 0):
            click.echo(
                f"{self.folder.path}: the checkpoint is of epoch {epoch + 1}, step {step}; the same command goes on from there",
                err=True,
            )


def _lost(error: Exception, config: TrainConfig) -> str:
    # torch's advice, which comes next, is about an argument of its own.
    what = str(error).splitlines()[0].partition(". ")[0]
    return (
        f"a process that makes batches is gone ({what}); it may have said why, above; where memory is short, lower "
        f"training.num_processes ({config.training.num_processes})"
    )


def _is_out_of_memory(error: Exception) -> bool:
    # Of the processors' memory, and of what a GPU's driver takes for itself, torch raises other RuntimeErrors.
    texts = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _has_hard_labels(batch: Batch) -> bool:
    return batch.tokens is not None or bool((batch.labels_N >= 0).any())


def _dev_metric(config: TrainConfig) -> str:
    """What the best epoch is chosen by."""
    return "frame_error_rate" if config.ctc is None else "token_error_rate"


def _note(record: dict[str, Any], metric: str) -> str:
    dev = ""
    if "dev" in record:
        dev = f", dev {metric.removesuffix('_rate').replace('_', ' ')} {record['dev'][metric]:.2f}%"
    return f"epoch {record['epoch']}: hard loss {record['hard_loss']:.3f}{dev}"


def _digest(datasets: Sequence[SoftLabelDataset]) -> str | list[str] | None:
    """Of the labels; of several datasets a list, in their order: it decides which of them teaches a step."""
    digests = [dataset.manifest.content_digest for dataset in datasets]
    return digests if len(digests) > 1 else next(iter(digests), None)


def _further_digests(inputs: Inputs, dev: TrainingData | None) -> dict[str, str | None]:
    """Of what the corpus digest is not over; None of what a run has no use for."""
    digests = {"transcripts_digest": inputs.transcripts_digest, "hard_labels_digest": inputs.hard_labels_digest}
    if dev is None:
        return digests
    # They choose the best epoch.
    dev_transcripts = None if dev.spelling is None else transcripts_digest(dev.corpus)
    return digests | {"dev_corpus_digest": dev.corpus.digest, "dev_transcripts_digest": dev_transcripts}


def _check_settings(folder: RunFolder, before: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises InputError, with their values, where settings that decide the result are others than before."""
    there = parse(TrainConfig, before["config"], where=f"{folder.path / CHECKPOINT} (config)")
    here = TrainConfig.model_validate(identity["config"])
    unlike = unlike_settings(*(flat_settings(config.result_settings()) for config in (there, here)))
    if unlike:
        raise InputError(
            f"{folder.path} holds a run of other settings than these ({'; '.join(unlike)}); set them back, use another output "
            "folder or delete that one"
        )


def _resume(
    folder: RunFolder, identity: dict[str, Any], model: AcousticModel, optimizer: torch.optim.Optimizer
) -> Progress:
    state = folder.read_checkpoint()
    if state is None:
        return Progress()
    before = state["identity"]
    _check_settings(folder, before, identity)
    for key in _DIGESTS:
        if before.get(key) != identity.get(key):
            raise InputError(
                f"{folder.path} holds a run with another {key} ({before.get(key)}, now {identity.get(key)}); "
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
