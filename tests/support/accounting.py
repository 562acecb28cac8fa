"""What became of every frame: datasets of disturbed runs against that of an undisturbed one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.targets import labels_digest
from softlabel_schemas.verification import verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """An undisturbed run's dataset: its digest, its objects, and the labels of each utterance as (frames, digest)."""

    content_digest: str
    objects: dict[str, bytes]
    labels: dict[str, tuple[int, bytes]]

    @property
    def num_frames(self) -> int:
        return sum(frames for frames, _ in self.labels.values())


def reference_dataset(url: str) -> Reference:
    """Raises RuntimeError where the dataset is not a sound one with frames."""
    dataset = open_dataset(url)
    if problems := [problem for _, problem in verify(dataset) if problem]:
        raise RuntimeError(f"the undisturbed run's dataset {url}: {problems}")
    labels = {
        row.utterance_id: (row.targets.num_frames, labels_digest(row.utterance_id, row.targets)) for row in dataset
    }
    if not labels or not all(frames for frames, _ in labels.values()):
        raise RuntimeError(f"the undisturbed run's dataset {url} has utterances without frames, or none")
    return Reference(content_digest=dataset.manifest.content_digest, objects=objects(url), labels=labels)


@dataclass(slots=True)
class Account:
    """What became of the frames of all published datasets, against those of the undisturbed run."""

    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    datasets: int = 0
    frames: int = 0
    expected: int = 0
    lost: int = 0
    duplicated: int = 0
    corrupted: int = 0
    other_digests: int = 0
    other_objects: int = 0
    failed_runs: list[str] = field(default_factory=list)

    @property
    def all_is_well(self) -> bool:
        wrong = (self.lost, self.duplicated, self.corrupted, self.other_digests, self.other_objects)
        return self.frames == self.expected > 0 and not any(wrong) and not self.failed_runs

    def compare(self, url: str, reference: Reference) -> None:
        """Count a published dataset."""
        self.datasets += 1
        self.expected += reference.num_frames
        dataset = open_dataset(url)
        problems = [problem for _, problem in verify(dataset) if problem]
        if problems:
            self.failed_runs.append(f"{url}: {problems}")
        self.other_digests += dataset.manifest.content_digest != reference.content_digest
        self.other_objects += objects(url) != reference.objects
        seen: set[str] = set()
        for index in range(dataset.num_shards):
            try:
                shard = dataset.read_shard(index)
            except IntegrityError:
                # Counted as lost below.
                continue
            for row in shard:
                frames, digest = reference.labels.get(row.utterance_id, (0, b""))
                self.frames += row.targets.num_frames
                if row.utterance_id in seen:
                    self.duplicated += row.targets.num_frames
                elif labels_digest(row.utterance_id, row.targets) != digest:
                    self.corrupted += max(frames, row.targets.num_frames)
                seen.add(row.utterance_id)
        self.lost += sum(frames for name, (frames, _) in reference.labels.items() if name not in seen)


def objects(url: str) -> dict[str, bytes]:
    """Every object below ``url`` by name, leftovers of killed local writers left out."""
    store = ObjectStore(url)
    names = sorted(store.list(""))
    return dict(zip(names, store.read_many(names), strict=True))
