"""A dataset's labels in plain columns, for tools that know neither the format nor its codecs.

Parquet: ``NNNNNN.parquet`` for each shard with utterances, a row for each utterance. Its frames are lists:

    utterance_id string, num_frames int32, kept_mass, entropy, agreement float32
    class_ids list<list<uint16>>        [frame][entry], by falling probability; uint32 for more than 65,536 classes
    log_probs list<list<float32>>       parallel to class_ids; natural, raw (not renormalised)
    tail_mass list<list<float32>>       [frame][temperature]

Zarr v3: one group. Entries of all frames are joined, and offsets say where frames and utterances begin (N utterances, T frames
and E entries of the whole dataset, K temperatures):

    utterance_id_bytes uint8, utterance_id_offsets int64 [N + 1]
    frame_offsets int64 [N + 1]         frames of utterance n: frame_offsets[n] to frame_offsets[n + 1]
    entry_offsets int64 [T + 1]         entries of frame t: entry_offsets[t] to entry_offsets[t + 1]
    class_ids uint16 or uint32 [E], log_probs float32 [E], tail_mass float32 [T, K]

Class names, temperatures, frame shift, fingerprint and content digest are in the key-value metadata of each Parquet file and in
the attributes of the Zarr group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.codecs import ZstdCodec

from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.shard import Shard
from softlabel_schemas.targets import SoftTargets, offsets_of

# Readers decode a row group at a time: 256 utterances of 10 s are some 10 MB.
_ROWS_PER_GROUP = 256
# Elements; 4 MiB of the widest.
_CHUNK = 1 << 20


def write_parquet(dataset: SoftLabelDataset, shards: Iterable[Shard], folder: Path) -> None:
    """Each shard of ``dataset``, which ``shards`` are, into ``folder``."""
    metadata = {f"softlabels.{name}": json.dumps(value) for name, value in _facts(dataset).items()}
    for index, shard in enumerate(shards):
        if len(shard):
            table = _table(shard).replace_schema_metadata(metadata)
            pq.write_table(
                table,
                folder / f"{index:06d}.parquet",
                row_group_size=_ROWS_PER_GROUP,
                compression="zstd",
                write_page_checksum=True,
            )


def write_zarr(dataset: SoftLabelDataset, shards: Iterable[Shard], folder: Path) -> None:
    """All shards of ``dataset``, which ``shards`` are, into ``folder``, which becomes a group."""
    manifest = dataset.manifest
    num_temperatures = len(manifest.spec.temperatures)
    group = zarr.create_group(folder, zarr_format=3, attributes=_facts(dataset))
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "utterance_id_offsets": ((manifest.num_utterances + 1,), np.int64),
        "frame_offsets": ((manifest.num_utterances + 1,), np.int64),
        "entry_offsets": ((manifest.num_frames + 1,), np.int64),
        "class_ids": ((manifest.num_entries,), _id_type(manifest.spec.num_classes)),
        "log_probs": ((manifest.num_entries,), np.float32),
        "tail_mass": ((manifest.num_frames, num_temperatures), np.float32),
    }
    arrays = {name: _array(group, name, shape, dtype) for name, (shape, dtype) in shapes.items()}
    # The manifest does not say how long the ids are.
    id_bytes = _array(group, "utterance_id_bytes", (0,), np.uint8)
    # How much is written of each; what begins with a zero has one element more than that.
    num_utterances = num_frames = num_entries = num_id_bytes = 0
    for shard in shards:
        targets, own = shard.targets, len(shard)
        utterances = slice(num_utterances + 1, num_utterances + own + 1)
        frames = slice(num_frames, num_frames + targets.num_frames)
        entries = slice(num_entries, num_entries + targets.num_entries)
        ids = [utterance_id.encode() for utterance_id in shard.utterance_ids]
        id_offsets = offsets_of([len(each) for each in ids])
        arrays["utterance_id_offsets"][utterances] = id_offsets[1:] + num_id_bytes
        id_bytes.append(np.frombuffer(b"".join(ids), dtype=np.uint8))
        arrays["frame_offsets"][utterances] = shard.frame_offsets[1:] + num_frames
        arrays["entry_offsets"][frames.start + 1 : frames.stop + 1] = targets.offsets[1:] + num_entries
        arrays["class_ids"][entries] = targets.class_ids.astype(_id_type(targets.num_classes))
        arrays["log_probs"][entries] = targets.log_probs
        arrays["tail_mass"][frames] = targets.tail_mass
        num_utterances, num_frames, num_entries = num_utterances + own, frames.stop, entries.stop
        num_id_bytes += int(id_offsets[-1])


def _facts(dataset: SoftLabelDataset) -> dict[str, Any]:
    spec = dataset.manifest.spec
    return {
        "temperatures": list(spec.temperatures),
        "frame_shift_ms": spec.frame_shift_ms,
        "num_classes": spec.num_classes,
        "inventory": dataset.inventory.model_dump(mode="json"),
        "fingerprint": dataset.manifest.fingerprint,
        "content_digest": dataset.manifest.content_digest,
    }


def _id_type(num_classes: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if num_classes <= 1 << 16 else np.uint32


def _table(shard: Shard) -> pa.Table:
    targets, frame_offsets = shard.targets, shard.frame_offsets
    # pyarrow's lists have offsets of 32 bits; a shard has less than 2 GiB, and so fewer entries.
    entry_offsets = targets.offsets.astype(np.int32)
    return pa.table(
        {
            "utterance_id": pa.array(shard.utterance_ids, pa.string()),
            "num_frames": pa.array(np.diff(frame_offsets).astype(np.int32)),
            "kept_mass": pa.array(shard.kept_mass),
            "entropy": pa.array(shard.entropy),
            "agreement": pa.array(shard.agreement, mask=np.isnan(shard.agreement)),
            "class_ids": _lists(targets.class_ids.astype(_id_type(targets.num_classes)), entry_offsets, frame_offsets),
            "log_probs": _lists(targets.log_probs, entry_offsets, frame_offsets),
            "tail_mass": _lists(targets.tail_mass.reshape(-1), _tail_offsets(targets), frame_offsets),
        }
    )


def _tail_offsets(targets: SoftTargets) -> npt.NDArray[np.int32]:
    return np.arange(targets.num_frames + 1, dtype=np.int32) * len(targets.temperatures)


def _lists(values: npt.NDArray[Any], inner: npt.NDArray[np.int32], outer: npt.NDArray[np.int64]) -> pa.ListArray:
    frames = pa.ListArray.from_arrays(pa.array(inner), pa.array(values))
    return pa.ListArray.from_arrays(pa.array(outer.astype(np.int32)), frames)


def _array(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    # An empty one may grow.
    chunks = (min(shape[0] or _CHUNK, _CHUNK), *shape[1:])
    return group.create_array(
        name, shape=shape, dtype=dtype, chunks=chunks, compressors=ZstdCodec(level=3, checksum=True), fill_value=0
    )
