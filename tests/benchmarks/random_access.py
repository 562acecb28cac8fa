"""Random access: requests and milliseconds of one utterance, and of 64 at once, against whole shards; bytes of the index.

    python -m tests.benchmarks.random_access [--shards 32] [--utterances 512] [--frames 300] [--json]

The dataset lies on a Ceph RGW on loopback where that is installed, else on a local disk; the notes say which. *Cold* is a
dataset just opened, *warm* one that has the bucket of the utterance in memory, but not its block. A loopback has no latency to
speak of: what is measured is bytes and decoding; on a real network each request takes 10 to 30 ms besides.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softlabel_schemas import ClassInventory, LabelledUtterance, SoftLabelDataset, UtteranceStats, layout, open_dataset
from softlabel_schemas.commit import begin, commit_shard, publish, read_commits
from softlabel_schemas.manifest import SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.selection import TopK
from softlabel_schemas.spec import StorageSpec
from tests.benchmarks.command_line import benchmark_parser, print_figures
from tests.benchmarks.figures import Figure, interleaved, median_and_spread
from tests.support.datasets import SPEC
from tests.support.indices import requests
from tests.support.rgw import missing_programs, s3_environment, serve
from tests.support.targets import random_targets

_AT_ONCE = 64
_INVENTORY = ClassInventory(names=tuple(f"senone-{index}" for index in range(660)))
_SPEC = SPEC.model_copy(
    update={
        "inventory_digest": _INVENTORY.digest(),
        "num_classes": _INVENTORY.num_classes,
        "temperatures": (1.0,),
        "selection": TopK(k=20),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A dataset, its ids by shard, and where it lies."""

    url: str
    ids: list[list[str]]
    server: str


def figures(
    *, num_shards: int = 32, num_utterances: int = 512, num_frames: int = 300, repeats: int = 7
) -> list[Figure]:
    """Of a dataset of ``num_shards`` shards with so many utterances each, of so many frames."""
    with _dataset(num_shards, num_utterances, num_frames) as place:
        return [*_requests(place), *_one(place, repeats), *_many(place, repeats), *_bytes(place, num_frames)]


@contextlib.contextmanager
def _dataset(num_shards: int, num_utterances: int, num_frames: int) -> Iterator[_Place]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="random-access-")))
        url, server = str(folder / "labels"), "local disk"
        if not missing_programs():
            rgw = stack.enter_context(serve(folder / "rgw"))
            stack.enter_context(s3_environment(rgw.environment()))
            url, server = f"s3://{rgw.bucket}/labels", "Ceph RGW on loopback"
        yield _Place(url=url, ids=_write(url, num_shards, num_utterances, num_frames), server=server)


def _write(url: str, num_shards: int, num_utterances: int, num_frames: int) -> list[list[str]]:
    rng = np.random.default_rng(0)
    # As many as a block has rows, so that it does not hold any twice, which would compress better than speech.
    targets = [
        random_targets(
            rng, num_frames=num_frames, num_classes=_INVENTORY.num_classes, max_entries=20, temperatures=(1.0,)
        )
        for _ in range(64)
    ]
    stats = UtteranceStats(kept_mass=0.9, entropy=1.0, agreement=0.5)
    storage = StorageSpec(
        shard_format="parquet",
        num_shards=num_shards,
        num_rows=num_shards * num_utterances,
        shard_seconds=num_utterances * num_frames / 100,
        batch_seconds=60.0,
        on_error="fail",
    )
    store, document = ObjectStore(url), SpecDocument(spec=_SPEC, storage=storage)
    begin(store, document, _INVENTORY)
    ids = []
    for shard in range(num_shards):
        ids.append([f"corpus-{shard:04d}-utterance-{row:06d}" for row in range(num_utterances)])
        utterances = [
            LabelledUtterance(utterance_id=each, targets=targets[row % len(targets)], stats=stats)
            for row, each in enumerate(ids[-1])
        ]
        commit_shard(
            store,
            document,
            ShardRange(index=shard, first_row=shard * num_utterances, num_rows=num_utterances),
            utterances,
            [],
        )
    publish(store, document)
    return ids


def _requests(place: _Place) -> list[Figure]:
    dataset = open_dataset(place.url)
    with requests() as cold:
        dataset[place.ids[0][0]]
    # All buckets, but no block that is asked for next.
    dataset.read_utterances([ids[0] for ids in place.ids])
    with requests() as warm:
        dataset[place.ids[-1][-1]]
    found = []
    for name, log, most in (("cold", cold, 2), ("warm", warm, 1)):
        found.append(
            Figure(
                name=f"requests of one utterance, {name}",
                unit="requests",
                value=len(log),
                target=f"<= {most}",
                met=len(log) <= most,
                note=place.server,
            )
        )
    return found


def _one(place: _Place, repeats: int) -> list[Figure]:
    rng = np.random.default_rng(1)

    def random_place() -> tuple[int, str]:
        shard = int(rng.integers(len(place.ids)))
        return shard, place.ids[shard][int(rng.integers(len(place.ids[0])))]

    def cold(dataset: SoftLabelDataset) -> Callable[[], object]:
        _, utterance_id = random_place()
        return lambda: dataset[utterance_id]

    def warm(dataset: SoftLabelDataset) -> Callable[[], object]:
        shard, utterance_id = random_place()
        others = place.ids[(shard + 1) % len(place.ids)]
        # Through the same bucket: there are few.
        for each in others[:: max(1, len(others) // 16)]:
            dataset[each]
        return lambda: dataset[utterance_id]

    def whole(dataset: SoftLabelDataset) -> Callable[[], object]:
        shard, utterance_id = random_place()

        def read() -> object:
            found = dataset.read_shard(shard)
            return found[found.utterance_ids.index(utterance_id)]

        return read

    return _timed("one utterance", place, [("cold", cold), ("warm", warm)], whole, repeats)


def _many(place: _Place, repeats: int) -> list[Figure]:
    rng = np.random.default_rng(2)
    everything = [utterance_id for ids in place.ids for utterance_id in ids]
    shard_of = {utterance_id: shard for shard, ids in enumerate(place.ids) for utterance_id in ids}

    def wanted() -> list[str]:
        return [everything[n] for n in rng.permutation(len(everything))[:_AT_ONCE]]

    def at_once(dataset: SoftLabelDataset) -> Callable[[], object]:
        ids = wanted()
        return lambda: dataset.read_utterances(ids)

    def one_by_one(dataset: SoftLabelDataset) -> Callable[[], object]:
        ids = wanted()
        return lambda: [dataset[each] for each in ids]

    def whole(dataset: SoftLabelDataset) -> Callable[[], object]:
        ids = set(wanted())
        shards = sorted({shard_of[each] for each in ids})
        return lambda: [
            utterance for shard in dataset.iter_shards(shards) for utterance in shard if utterance.utterance_id in ids
        ]

    name = f"{_AT_ONCE} random utterances"
    return _timed(name, place, [("at once", at_once), ("one by one", one_by_one)], whole, repeats)


Prepared = Callable[[SoftLabelDataset], Callable[[], object]]


def _timed(name: str, place: _Place, ways: list[tuple[str, Prepared]], whole: Prepared, repeats: int) -> list[Figure]:
    """Each way on a dataset just opened, in turn, against reading whole shards."""

    def seconds(prepare: Prepared) -> Callable[[], float]:
        def run() -> float:
            read = prepare(open_dataset(place.url))
            started = time.perf_counter()
            read()
            return time.perf_counter() - started

        return run

    *found, baseline = interleaved([seconds(way) for _, way in ways] + [seconds(whole)], repeats)
    figures = []
    for (way, _), values in zip(ways, found, strict=True):
        median, spread = median_and_spread(values)
        figures.append(
            Figure(
                name=f"{name}, {way}",
                unit="ms",
                value=1000 * median,
                baseline=1000 * median_and_spread(baseline)[0],
                baseline_name="whole shards",
                spread=spread,
                note=place.server,
            )
        )
    return figures


def _bytes(place: _Place, num_frames: int) -> list[Figure]:
    """The index in the buckets, the manifest and the commit records."""
    dataset = open_dataset(place.url)
    document = SpecDocument(spec=dataset.manifest.spec, storage=dataset.manifest.storage)
    commits = read_commits(dataset.store, document, range(dataset.num_shards))
    buckets = sum(entry.num_bytes for entry in dataset.store.list(layout.INDEX).values())
    documents = len(dataset.manifest.index or "") + sum(len(commit.index or "") for commit in commits)
    per_utterance = (buckets + documents) / len(dataset)
    return [
        Figure(name="index", unit="bytes/utterance", value=per_utterance),
        Figure(name=f"index, utterances of {num_frames} frames", unit="bytes/frame", value=per_utterance / num_frames),
    ]


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--utterances", type=int, default=512, help="of each shard")
    parser.add_argument("--frames", type=int, default=300, help="of each utterance")
    options = parser.parse_args()
    found = figures(
        num_shards=options.shards,
        num_utterances=options.utterances,
        num_frames=options.frames,
        repeats=options.repeats,
    )
    print_figures(found, as_json=options.json)


if __name__ == "__main__":
    main()
