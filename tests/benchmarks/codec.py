"""The codecs on real posteriors: bytes a frame, what they change, and how fast one core writes and reads them.

    python -m tests.benchmarks.codec FILE --top-k 20 --json

FILE is an ``.npz`` of ranked posteriors: frames_per_utterance [N], class_ids [T, K], log_probs [T, K], tail_mass [T] and
num_classes. Against a baseline in the same run: ids as uint16, log-probabilities and tails as float16, zstd-3, without
container, index or checksums.

Bytes are those of a whole published dataset. Rates are frames a second of CPU time of the one thread: labels in memory to
a checked file on disk, and back. The KL divergence (nats, per frame) is from the captured to the decoded posterior over the
kept classes and the tail, both normalised: what the codec changes, not what the selection left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabel_schemas.codec import build_codec
from softlabel_schemas.commit import begin, commit_shard, publish
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.manifest import SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.selection import TopK
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats, decode_columns, encode_columns
from softlabel_schemas.spec import CodecName, DatasetSpec, StorageSpec, TeacherSpec
from softlabel_schemas.targets import SoftTargets
from tests.benchmarks.figures import Figure, interleaved, median_and_spread

DEFAULT_FILE = Path("../shared/data/posteriors/dev.npz")
CODECS: tuple[CodecName, ...] = ("mtf-sqrt", "packed-u8", "packed-f32")
BASELINE = "u16 + f16 + zstd"
_UTTERANCES_PER_BLOCK = 64

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Posteriors:
    """The ``top_k`` likeliest classes of T frames.

    Attributes:
        class_ids_TK: int32; log_probs_TK: float32; tail_T: float64, all outside.
    """

    class_ids_TK: npt.NDArray[np.int32]
    log_probs_TK: npt.NDArray[np.float32]
    tail_T: Float64
    frames_per_utterance: npt.NDArray[np.int64]
    num_classes: int

    @property
    def num_frames(self) -> int:
        return len(self.tail_T)

    def utterances(self) -> list[LabelledUtterance]:
        ends = np.cumsum(self.frames_per_utterance)
        return [
            self._utterance(f"utterance-{index:07d}", int(end - length), int(end))
            for index, (end, length) in enumerate(zip(ends, self.frames_per_utterance, strict=True))
        ]

    def _utterance(self, utterance_id: str, start: int, stop: int) -> LabelledUtterance:
        frames, width = slice(start, stop), self.class_ids_TK.shape[1]
        probs_TK = np.exp(self.log_probs_TK[frames].astype(np.float64))
        return LabelledUtterance(
            utterance_id=utterance_id,
            targets=SoftTargets(
                num_classes=self.num_classes,
                temperatures=(1.0,),
                offsets=np.arange(stop - start + 1, dtype=np.int64) * width,
                class_ids=self.class_ids_TK[frames].ravel(),
                log_probs=self.log_probs_TK[frames].ravel(),
                tail_mass=self.tail_T[frames, None].astype(np.float32),
            ),
            # Numbers that differ from utterance to utterance, as real ones do.
            stats=UtteranceStats(
                kept_mass=float(probs_TK.sum(axis=1).mean()),
                entropy=float(-(probs_TK * self.log_probs_TK[frames]).sum(axis=1).mean()),
                agreement=float(probs_TK[:, 0].mean()),
            ),
        )

    def kl_T(self, log_probs_TK: npt.NDArray[np.floating], tail_T: npt.NDArray[np.floating]) -> Float64:
        """Divergence of the decoded posterior, float64 [T]."""
        exact_TC, found_TC = (
            np.concatenate([np.exp(log_probs.astype(np.float64)), tail.astype(np.float64)[:, None]], axis=1)
            for log_probs, tail in ((self.log_probs_TK, self.tail_T), (log_probs_TK, tail_T))
        )
        exact_TC /= exact_TC.sum(axis=1, keepdims=True)
        found_TC /= found_TC.sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms_TC = exact_TC * (np.log(exact_TC) - np.log(found_TC))
        return np.asarray(np.where(exact_TC > 0, terms_TC, 0.0).sum(axis=1))


def load(path: Path, top_k: int, num_utterances: int | None = None) -> Posteriors:
    with np.load(path, allow_pickle=False) as data:
        lengths = data["frames_per_utterance"].astype(np.int64)[:num_utterances]
        frames = slice(0, int(lengths.sum()))
        log_probs_TL = data["log_probs"][frames].astype(np.float64)
        return Posteriors(
            class_ids_TK=np.ascontiguousarray(data["class_ids"][frames, :top_k].astype(np.int32)),
            log_probs_TK=np.ascontiguousarray(data["log_probs"][frames, :top_k]),
            tail_T=np.exp(log_probs_TL[:, top_k:]).sum(axis=1) + data["tail_mass"][frames],
            frames_per_utterance=lengths,
            num_classes=int(data["num_classes"]),
        )


def measure(posteriors: Posteriors, *, shard_format: str, repeats: int) -> dict[str, dict[str, Any]]:
    """By codec, and for the baseline: bytes_per_frame, shard_bytes_per_frame, kl_mean, kl_p99, and rates with their spread."""
    with tempfile.TemporaryDirectory() as folder:
        subjects: dict[str, _Subject] = {
            name: _Codec(name, posteriors, Path(folder) / name, shard_format) for name in CODECS
        }
        subjects[BASELINE] = _Baseline(posteriors, Path(folder) / "baseline")
        found = {}
        for name, subject in subjects.items():
            subject.write()
            kl_T = posteriors.kl_T(*subject.read())
            found[name] = subject.sizes() | {
                "kl_mean": float(kl_T.mean()),
                "kl_p99": float(np.quantile(kl_T, 0.99)),
            }
        for kind in ("write", "read"):
            times = interleaved([_timed(getattr(subject, kind)) for subject in subjects.values()], repeats)
            for name, seconds in zip(subjects, times, strict=True):
                rate, spread = median_and_spread([posteriors.num_frames / each for each in seconds])
                found[name] |= {f"{kind}_frames_per_s": rate, f"{kind}_spread": spread}
    return found


def _timed(function: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.thread_time()
        function()
        return time.thread_time() - start

    return seconds


class _Subject(Protocol):
    """Something that stores the posteriors and reads them back."""

    def write(self) -> None: ...

    def read(self) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        """Log-probabilities [T, K] and tail [T]."""
        ...

    def sizes(self) -> dict[str, float]: ...


class _Codec:
    def __init__(self, name: CodecName, posteriors: Posteriors, folder: Path, shard_format: str) -> None:
        self._posteriors, self._folder = posteriors, folder
        self._utterances = posteriors.utterances()
        self._document = _document(posteriors, name, shard_format)
        self._codec, self._container = build_codec(self._document.spec), CONTAINERS[self._document.storage.shard_format]
        self._digests: dict[str, str] = {}
        folder.mkdir()

    def write(self) -> None:
        files = self._container.encode(encode_columns(self._utterances, self._codec), self._codec.zstd_level)
        self._digests = {name: sha256_hex(data) for name, data in files.items()}
        for name, data in files.items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def read(self) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        files = {name: (self._folder / name).read_bytes() for name in self._digests}
        assert {name: sha256_hex(data) for name, data in files.items()} == self._digests
        columns = self._container.decode(files, self._codec.streams, where="the shard")
        targets = decode_columns(columns, self._codec, where="the shard").targets
        return targets.log_probs.reshape(targets.num_frames, -1), targets.tail_mass[:, 0]

    def sizes(self) -> dict[str, float]:
        num_frames = self._posteriors.num_frames
        shard = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        with tempfile.TemporaryDirectory() as folder:
            store = ObjectStore(folder)
            names = tuple(f"senone-{index}" for index in range(self._posteriors.num_classes))
            begin(store, self._document, ClassInventory(names=names))
            shard_range = ShardRange(index=0, first_row=0, num_rows=len(self._utterances))
            commit_shard(store, self._document, shard_range, self._utterances, [])
            publish(store, self._document)
            dataset = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return {"bytes_per_frame": dataset / num_frames, "shard_bytes_per_frame": shard / num_frames}


class _Baseline:
    def __init__(self, posteriors: Posteriors, path: Path) -> None:
        self._posteriors, self._path, self._zstd = posteriors, path, pa.Codec("zstd", compression_level=3)
        ends = np.cumsum(posteriors.frames_per_utterance)
        self._cuts = [0, *ends[_UTTERANCES_PER_BLOCK - 1 : -1 : _UTTERANCES_PER_BLOCK].tolist(), int(ends[-1])]
        self._sizes: list[int] = []

    def write(self) -> None:
        own, blocks = self._posteriors, []
        for start, stop in zip(self._cuts, self._cuts[1:], strict=False):
            columns = (
                own.class_ids_TK[start:stop].astype("<u2"),
                own.log_probs_TK[start:stop].astype("<f2"),
                own.tail_T[start:stop].astype("<f2"),
            )
            blocks.append(self._zstd.compress(b"".join(column.tobytes() for column in columns), asbytes=True))
        self._sizes = [len(block) for block in blocks]
        self._path.write_bytes(b"".join(blocks))

    def read(self) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        data, position, width = self._path.read_bytes(), 0, self._posteriors.class_ids_TK.shape[1]
        ids, log_probs, tails = [], [], []
        for size, start, stop in zip(self._sizes, self._cuts, self._cuts[1:], strict=False):
            entries = (stop - start) * width
            num_bytes = 4 * entries + 2 * (stop - start)
            raw = self._zstd.decompress(data[position : position + size], num_bytes, asbytes=True)
            position += size
            ids.append(np.frombuffer(raw, "<u2", entries).astype(np.int32))
            log_probs.append(np.frombuffer(raw, "<f2", entries, 2 * entries).astype(np.float32))
            tails.append(np.frombuffer(raw, "<f2", stop - start, 4 * entries).astype(np.float32))
        np.testing.assert_array_equal(np.concatenate(ids), self._posteriors.class_ids_TK.ravel())
        return np.concatenate(log_probs).reshape(-1, width), np.concatenate(tails)

    def sizes(self) -> dict[str, float]:
        per_frame = self._path.stat().st_size / self._posteriors.num_frames
        return {"bytes_per_frame": per_frame, "shard_bytes_per_frame": per_frame}


def _document(posteriors: Posteriors, codec: CodecName, shard_format: str) -> SpecDocument:
    names = tuple(f"senone-{index}" for index in range(posteriors.num_classes))
    return SpecDocument(
        spec=DatasetSpec(
            corpus_digest="0" * 64,
            inventory_digest=ClassInventory(names=names).digest(),
            num_classes=posteriors.num_classes,
            frame_shift_ms=30.0,
            teachers=(TeacherSpec(name="ensemble", digest="0" * 64, weight=1.0),),
            combination="arithmetic",
            temperatures=(1.0,),
            selection=TopK(k=posteriors.class_ids_TK.shape[1]),
            codec=codec,
            precision="float32",
        ),
        storage=StorageSpec.model_validate(
            {
                "shard_format": shard_format,
                "num_shards": 1,
                "num_rows": len(posteriors.frames_per_utterance),
                "shard_seconds": 7200.0,
                "batch_seconds": 60.0,
                "on_error": "fail",
            }
        ),
    )


def figures(path: Path = DEFAULT_FILE, *, top_k: int = 20, repeats: int = 25) -> list[Figure]:
    if not path.exists():
        return [Figure(name="codec", unit="", value=float("nan"), note=f"{path} is not there")]
    found = measure(load(path, top_k), shard_format="parquet", repeats=repeats)
    own, baseline = found["mtf-sqrt"], found[BASELINE]

    def figure(name: str, key: str, unit: str, target: str, met: bool, scale: float = 1.0) -> Figure:
        spread = own.get(key.replace("frames_per_s", "spread"))
        return Figure(
            name=f"codec, top-{top_k}: {name}",
            unit=unit,
            value=own[key] * scale,
            baseline=baseline[key] * scale,
            baseline_name=BASELINE,
            target=target,
            met=met,
            spread=spread if key.endswith("frames_per_s") else None,
        )

    return [
        figure("published dataset", "bytes_per_frame", "B/frame", "<= 25", own["bytes_per_frame"] <= 25),
        figure("mean KL", "kl_mean", "nats", "<= 1e-4", own["kl_mean"] <= 1e-4),
        figure("99th percentile of KL", "kl_p99", "nats", "", True),
        figure("write", "write_frames_per_s", "M frames/s", ">= 1.5", own["write_frames_per_s"] >= 1.5e6, 1e-6),
        figure("read and decode", "read_frames_per_s", "M frames/s", ">= 4", own["read_frames_per_s"] >= 4e6, 1e-6),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=DEFAULT_FILE, help="posteriors, .npz")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--shard-format", choices=list(CONTAINERS), default="parquet")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    posteriors = load(options.file, options.top_k)
    found = measure(posteriors, shard_format=options.shard_format, repeats=options.repeats)
    if options.json:
        about = {"file": options.file.name, "num_frames": posteriors.num_frames, "top_k": options.top_k}
        print(json.dumps(about | {"shard_format": options.shard_format, "results": found}, indent=2))
        return
    print(f"{'':18} {'B/frame':>8} {'in shards':>10} {'KL mean':>9} {'KL p99':>9} {'write':>7} {'read':>7}  M frames/s")
    for name, row in found.items():
        print(
            f"{name:18} {row['bytes_per_frame']:8.2f} {row['shard_bytes_per_frame']:10.2f} {row['kl_mean']:9.1e} "
            f"{row['kl_p99']:9.1e} {row['write_frames_per_s'] / 1e6:7.2f} {row['read_frames_per_s'] / 1e6:7.2f}"
        )


if __name__ == "__main__":
    main()
