"""``softlabels diff``: in which settings two datasets differ, and how far their labels are from each other.

Shards of the first are read one after the other, and of the second the utterances that it shares with them: two shards are in
memory, whatever the datasets hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.distance import Distance, distance, same_targets
from softlabel_schemas.errors import InputError
from softlabel_schemas.sampled_shards import evenly_spaced, share_of
from softlabel_schemas.targets import SoftTargets


@dataclass(slots=True, kw_only=True)
class LabelDifference:
    """Sums over what was compared.

    Attributes:
        num_only_a: utterances of the shards compared that b does not have.
        num_other_length: shared utterances of another number of frames, which are not compared.
        num_frames: of the others; ``num_known``: those in which both store entries.
        kl_ab, kl_ba: see :class:`softlabel_schemas.distance.Distance`; nats.
    """

    num_utterances: int = 0
    num_only_a: int = 0
    num_other_length: int = 0
    num_identical: int = 0
    num_frames: int = 0
    num_known: int = 0
    num_entries_a: int = 0
    num_entries_b: int = 0
    num_shared: int = 0
    num_same_top1: int = 0
    kl_ab: float = 0.0
    kl_ba: float = 0.0
    max_kl_ab: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Means beside the counts; None where nothing was compared."""
        known = self.num_known
        return {
            "utterances": self.num_utterances,
            "only_in_a": self.num_only_a,
            "of_other_length": self.num_other_length,
            "identical_utterances": self.num_identical,
            "frames": self.num_frames,
            "frames_compared": known,
            "entries_a": self.num_entries_a,
            "entries_b": self.num_entries_b,
            "entries_shared": self.num_shared,
            "top1_agreement": self.num_same_top1 / known if known else None,
            "kl_ab_nats": self.kl_ab / known if known else None,
            "kl_ba_nats": self.kl_ba / known if known else None,
            "max_utterance_kl_ab_nats": self.max_kl_ab if known else None,
        }


def spec_differences(a: SoftLabelDataset, b: SoftLabelDataset) -> dict[str, tuple[Any, Any]]:
    """The settings in which two datasets differ, with both values; those of the storage too."""
    found: dict[str, tuple[Any, Any]] = {}
    for of_a, of_b in (
        (a.manifest.spec.fields(), b.manifest.spec.fields()),
        (a.manifest.storage.model_dump(mode="json"), b.manifest.storage.model_dump(mode="json")),
    ):
        for name in {**of_a, **of_b}:
            if of_a.get(name) != of_b.get(name):
                found[name] = (of_a.get(name), of_b.get(name))
    return found


def shards_to_compare(a: SoftLabelDataset, fraction: float) -> list[int]:
    return evenly_spaced(a.num_shards, share_of(a.num_shards, fraction))


def compare_labels(a: SoftLabelDataset, b: SoftLabelDataset, shards: list[int]) -> Iterator[LabelDifference]:
    """The difference so far, after each shard of ``a``.

    Raises:
        InputError: the classes are not the same.
        IntegrityError, OSError: labels cannot be read.
    """
    if a.manifest.spec.inventory_digest != b.manifest.spec.inventory_digest:
        raise InputError(
            f"labels of different class inventories cannot be compared: {a.store.url} has "
            f"{a.manifest.spec.inventory_digest[:12]}, {b.store.url} {b.manifest.spec.inventory_digest[:12]}"
        )
    total = LabelDifference()
    for shard in a.iter_shards(shards):
        there = b.shards_of(shard.utterance_ids)
        total.num_only_a += sum(index is None for index in there.values())
        shared = [utterance for utterance in shard if there[utterance.utterance_id] is not None]
        others = b.read_utterances([utterance.utterance_id for utterance in shared])
        for own, other in zip(shared, others, strict=True):
            total.num_utterances += 1
            if own.targets.num_frames != other.targets.num_frames:
                total.num_other_length += 1
                continue
            found = distance(own.targets, other.targets, a.manifest.spec.codec, b.manifest.spec.codec)
            _add(total, own.targets, other.targets, found)
        yield total


def _add(total: LabelDifference, a: SoftTargets, b: SoftTargets, found: Distance) -> None:
    num_known = int(found.is_known_T.sum())
    total.num_frames += a.num_frames
    total.num_known += num_known
    total.num_entries_a += a.num_entries
    total.num_entries_b += b.num_entries
    total.num_shared += int(found.num_shared_T.sum())
    total.num_same_top1 += int(found.same_top1_T.sum())
    total.kl_ab += float(found.kl_ab_T.sum())
    total.kl_ba += float(found.kl_ba_T.sum())
    total.max_kl_ab = max(total.max_kl_ab, float(found.kl_ab_T.sum()) / max(num_known, 1))
    total.num_identical += same_targets(a, b)
