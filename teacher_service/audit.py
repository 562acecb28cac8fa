"""``teacher-service audit``: label random shards of a published dataset once more, and compare.

What is made anew goes through the codec too, so that on the hardware that made the dataset it is equal to the bit. Other
hardware rounds otherwise: within the tolerance that is no fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from softlabel_schemas.codec import build_codec
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.distance import distance, same_targets
from softlabel_schemas.errors import InputError
from softlabel_schemas.sampled_shards import share_of
from softlabel_schemas.shard import LabelledUtterance, decode_columns, encode_columns
from softlabel_schemas.spec import CodecName
from softlabel_schemas.targets import SoftTargets
from teacher_service.job import PreparedJob
from teacher_service.pipeline import label_shard
from teacher_service.teacher import check_gpu, load_teachers

# Of frames and of entries: what may fall on the other side of a tie, or of the end of a selection.
_SHARE_ALIKE = 0.99
# Between angles arcsin(sqrt(tail mass)): three steps of the coarsest codec, a tail of 0.50 against 0.52.
_TAIL_TOLERANCE = 0.02
_MAX_PROBLEMS = 10


@dataclass(slots=True, kw_only=True)
class Audit:
    """Sums over the audited shards; ``problems``: what cannot come from rounding, in words.

    Attributes:
        num_identical: utterances whose labels are equal to the bit.
        kl: KL(stored || made anew), nats, added up over frames; see ``softlabel_schemas.distance``.
        worst_kl: of an utterance, mean over its frames.
        num_alike: frames whose likeliest class is the same, or that have no entry in either.
        num_shared: entries of the same class and frame.
        num_same_entries: frames with entries of the same classes; ``num_tails_alike``: those of them whose tail masses are the
            same at every temperature, within rounding.
    """

    tolerance: float
    codec: CodecName
    num_utterances: int = 0
    num_identical: int = 0
    num_frames: int = 0
    num_alike: int = 0
    num_stored: int = 0
    num_anew: int = 0
    num_shared: int = 0
    num_same_entries: int = 0
    num_tails_alike: int = 0
    kl: float = 0.0
    worst_kl: float = 0.0
    worst_utterance: str | None = None
    problems: list[str] = field(default_factory=list)

    def add(self, stored: LabelledUtterance, anew: SoftTargets) -> None:
        """One utterance."""
        targets, name = stored.targets, stored.utterance_id
        self.num_utterances += 1
        if targets.num_frames != anew.num_frames:
            self.problems.append(
                f"utterance {name}: {targets.num_frames} frames are stored, the teachers give {anew.num_frames}"
            )
            return
        found = distance(targets, anew, self.codec, self.codec)
        both_bare_T = (targets.counts_T == 0) & (anew.counts_T == 0)
        mean_kl = float(found.kl_ab_T.sum()) / max(targets.num_frames, 1)
        self.num_identical += same_targets(targets, anew)
        self.num_frames += targets.num_frames
        self.num_alike += int((found.same_top1_T | both_bare_T).sum())
        self.num_stored += targets.num_entries
        self.num_anew += anew.num_entries
        self.num_shared += int(found.num_shared_T.sum())
        # KL is of temperature 1: at others the posterior is scaled by what is in the tail.
        same_T = (found.num_shared_T == targets.counts_T) & (found.num_shared_T == anew.counts_T)
        angle_TK, other_TK = (np.arcsin(np.sqrt(each.tail_mass.astype(np.float64))) for each in (targets, anew))
        alike_T = (np.abs(angle_TK - other_TK) <= _TAIL_TOLERANCE).all(axis=1)
        self.num_same_entries += int(same_T.sum())
        self.num_tails_alike += int((same_T & alike_T).sum())
        self.kl += float(found.kl_ab_T.sum())
        if mean_kl > self.worst_kl:
            self.worst_kl, self.worst_utterance = mean_kl, name
        if mean_kl > self.tolerance:
            self.problems.append(
                f"utterance {name}: KL is {mean_kl:.3g} nats per frame, at most {self.tolerance:g} is tolerated"
            )

    def add_other_rows(self, shard: int, stored: Sequence[str], anew: Sequence[str]) -> None:
        """A shard that does not hold the utterances that were labelled."""
        differing = sorted(set(stored) ^ set(anew))
        only = f"labelled in one of the two only, the first is {differing[0]}" if differing else "in another order"
        self.problems.append(f"shard {shard}: utterances are {only}")

    def findings(self) -> list[str]:
        """Why the dataset fails; empty where it is what the teachers say."""
        found = self.problems[:_MAX_PROBLEMS]
        if len(self.problems) > _MAX_PROBLEMS:
            found.append(f"and {len(self.problems) - _MAX_PROBLEMS} more")
        for name, part, whole in (
            ("frames with the same likeliest class", self.num_alike, self.num_frames),
            ("entries stored of those made anew", self.num_shared, self.num_anew),
            ("entries made anew of those stored", self.num_shared, self.num_stored),
            (
                "frames with the same tail masses, of those with the same entries",
                self.num_tails_alike,
                self.num_same_entries,
            ),
        ):
            if part < _SHARE_ALIKE * whole:
                found.append(f"{name}: {part / whole:.2%}, at least {_SHARE_ALIKE:.0%} are expected")
        return found

    def facts(self) -> dict[str, Any]:
        frames = max(self.num_frames, 1)
        return {
            "utterances": self.num_utterances,
            "identical_utterances": self.num_identical,
            "frames": self.num_frames,
            "top1_agreement": self.num_alike / frames,
            "entries_shared": self.num_shared / max(self.num_stored, self.num_anew, 1),
            "kl_nats": self.kl / frames,
            "worst_utterance_kl_nats": self.worst_kl,
            "worst_utterance": self.worst_utterance,
            "tolerance_nats": self.tolerance,
            "findings": self.findings(),
        }


def shards_to_audit(dataset: SoftLabelDataset, fraction: float, seed: int) -> list[int]:
    """Drawn at random, ascending; at least one."""
    chosen = np.random.default_rng(seed).choice(
        dataset.num_shards, share_of(dataset.num_shards, fraction), replace=False
    )
    return sorted(int(index) for index in chosen)


def check_job(dataset: SoftLabelDataset, job: PreparedJob) -> None:
    """Raises InputError unless the job is the one that made the dataset: the same settings and the same cut into shards."""
    stored, wanted = dataset.manifest.spec.fields(), job.document.spec.fields()
    differing = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
    if differing:
        lines = "\n".join(
            f"  {name}: there {stored.get(name)!r}, in the job {wanted.get(name)!r}" for name in differing
        )
        raise InputError(f"{dataset.store.url} was not made by this job; give the job that made it:\n{lines}")
    there = [(shard.first_row, shard.num_rows) for shard in dataset.manifest.shards]
    if there != [(shard.first_row, shard.num_rows) for shard in job.plan]:
        raise InputError(
            f"{dataset.store.url} has {len(there)} shards of {dataset.manifest.storage.shard_seconds:g} s, the job cuts the "
            f"corpus into {len(job.plan)}; set destination.shard_seconds as it was"
        )


def audit(
    dataset: SoftLabelDataset,
    job: PreparedJob,
    shards: Sequence[int],
    *,
    tolerance: float,
    on_seconds: Callable[[float], None] = lambda _: None,
) -> Audit:
    """Label ``shards`` once more and compare; nothing is written.

    Args:
        tolerance: largest mean KL of an utterance, nats per frame.
        on_seconds: told the seconds of speech of each batch when it is done.

    Raises:
        InputError: the job is not the dataset's, or labels on GPUs and this machine has none.
        IntegrityError, OSError: a bundle, the corpus or the dataset cannot be read.
    """
    check_job(dataset, job)
    check_gpu(job.config)
    spec = dataset.manifest.spec
    # What is left out now and was not then, or the other way round, is a finding.
    storage = dataset.manifest.storage.model_copy(update={"on_error": "skip"})
    torch.set_num_threads(job.config.resources.cpus_per_actor)
    teachers, codec, found = (
        load_teachers(job.config, job.document.spec),
        build_codec(spec),
        Audit(tolerance=tolerance, codec=spec.codec),
    )
    for index in shards:
        stored, plan = dataset.read_shard(index), job.plan[index]
        rows = job.corpus.read(plan.first_row, plan.num_rows)
        labelled = label_shard(rows, teachers, spec, storage, on_batch=lambda batch: on_seconds(batch.seconds))
        anew = decode_columns(encode_columns(labelled.utterances, codec), codec, where=f"shard {index}, made anew")
        if stored.utterance_ids != anew.utterance_ids:
            found.add_other_rows(index, stored.utterance_ids, anew.utterance_ids)
            continue
        for of_dataset, of_teachers in zip(stored, anew, strict=True):
            found.add(of_dataset, of_teachers.targets)
    return found
