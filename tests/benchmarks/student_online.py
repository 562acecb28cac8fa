"""On-line distillation, what stored targets save: three teachers of a member's size run in the student's loop."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from softlabel_schemas import ClassInventory
from softlabel_schemas.bundle import BundleReader, write_bundle
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.utterance_reader import UtteranceReader
from student_trainer.batch import Batch
from student_trainer.data import Step
from student_trainer.models import build_acoustic_model
from teacher_service.batching import pad
from teacher_service.config import TeacherConfig
from teacher_service.ensemble import combine
from teacher_service.teacher import Teacher, load_teacher
from tests.benchmarks.student_parts import ToyCorpus, make_trainer
from tests.support.teachers import OWN_FACTORY, state

_MEL_BINS = {"tdnn": 40, "blstm": 40, "conv_glu": 64}
_ARGUMENTS: dict[str, dict[str, Any]] = {"tdnn": {}, "blstm": {"hidden": 112}, "conv_glu": {}}


def load_teachers(folder: Path, inventory: ClassInventory) -> list[Teacher]:
    """Random weights, larger than usual in the output layer, so that posteriors are peaked."""
    teachers = []
    for architecture, num_mel_bins in _MEL_BINS.items():
        front_end = Fbank(num_mel_bins=num_mel_bins, stack=3)
        arguments = {
            "architecture": architecture,
            "num_features": front_end.num_features,
            "num_classes": inventory.num_classes,
            "arguments": _ARGUMENTS[architecture],
        }
        torch.manual_seed(1)
        model = build_acoustic_model(**arguments)
        with torch.no_grad():
            model.heads[0].weight.mul_(8)
        write_bundle(
            folder / architecture,
            name=architecture,
            model=state(model),
            factory=OWN_FACTORY,
            arguments=arguments,
            front_end=front_end,
            inventory=inventory,
            frame_shift_ms=front_end.output_frame_shift_ms,
        )
        config = TeacherConfig(bundle=str(folder / architecture))
        teachers.append(
            load_teacher(
                config, BundleReader(config.bundle), weight=1 / len(_MEL_BINS), device="cpu", precision="float32"
            )
        )
    return teachers


class OnlineDistillation:
    """A student trained on the ensemble's whole posterior. The teachers' features are computed beforehand and kept in memory,
    as far as storing can help without storing targets."""

    def __init__(self, toy: ToyCorpus, teachers: list[Teacher], student: str) -> None:
        self.teachers, self.trainer = teachers, make_trainer(student, toy.num_classes)
        corpus = toy.corpus
        reader, front_ends = UtteranceReader(corpus), [teacher.front_end for teacher in teachers]
        self.features = {row.utterance_id: reader.features(row, front_ends) for row in corpus}

    def run_epoch(self, steps: Generator[Step, None, None]) -> float:
        """Seconds of the next epoch of ``steps``, which have no soft targets."""
        started = time.perf_counter()
        for step in steps:
            self._step(step.batch)
            if step.ends_epoch:
                break
        return time.perf_counter() - started

    def _step(self, batch: Batch) -> None:
        posterior_NV = self._posterior(batch)
        trainer = self.trainer
        trainer.model.train()
        (logits_NV,), _ = trainer.model.all_heads(batch.features_BTD, batch.lengths_B)
        log_student_NV = logits_NV.log_softmax(dim=1)
        hard = functional.nll_loss(log_student_NV, batch.labels_N)
        loss = 0.2 * hard - 0.8 * (posterior_NV * log_student_NV).sum(dim=1).mean()
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(trainer.model.parameters(), trainer.config.training.gradient_clip)
        trainer.optimizer.step()

    @torch.no_grad()
    def _posterior(self, batch: Batch) -> Tensor:
        logits = []
        for position, teacher in enumerate(self.teachers):
            inputs = pad([self.features[utterance_id][position] for utterance_id in batch.utterance_ids])
            logits.append(teacher.logits(*inputs)[0])
        log_posterior_BTV = combine(logits, [teacher.weight for teacher in self.teachers], "arithmetic")
        mask_BT = torch.arange(log_posterior_BTV.shape[1])[None, :] < batch.label_lengths_B[:, None]
        return log_posterior_BTV[mask_BT].exp()
