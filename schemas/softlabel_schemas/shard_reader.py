"""ShardReader: the shards of a published dataset and their blocks, fetched, checked against their digests, and decoded."""

from __future__ import annotations

from collections.abc import Sequence

from softlabel_schemas.cache import FileCache
from softlabel_schemas.codec import build_codec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.file_records import FileRecord
from softlabel_schemas.manifest import Manifest, ShardRecord
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.shard import Shard, ShardColumns, decode_columns
from softlabel_schemas.transfers import undamaged
from softlabel_schemas.utterance_index import BlockPlace, block_digest


class ShardReader:
    """Of a manifest; ``cache`` keeps what is fetched on a local disk. Any number of threads may use it."""

    def __init__(self, store: ObjectStore, manifest: Manifest, cache: FileCache | None) -> None:
        self._store, self._records, self._cache = store, manifest.shards, cache
        self._codec = build_codec(manifest.spec)
        self._container = CONTAINERS[manifest.storage.shard_format]

    def read_shard(self, index: int) -> Shard:
        """Read, check and decode a whole shard.

        Raises:
            IndexError: there is no such shard.
            IntegrityError: a file is missing, is not as it was written, or breaks an invariant.
        """
        return self.decode(index, self.read_columns(index)[1])

    def read_columns(self, index: int) -> tuple[dict[str, bytes], ShardColumns]:
        """A shard's files and what they hold; raises as :meth:`read_shard`."""
        if not 0 <= index < len(self._records):
            raise IndexError(f"shard {index} asked for, the dataset has {len(self._records)}")
        where = self.describe(index)
        files = self._read_files(self._records[index], where)
        return files, self._container.decode(files, self._codec.streams, where=where)

    def decode(self, index: int, columns: ShardColumns) -> Shard:
        """Raises as :meth:`read_shard`."""
        record, where = self._records[index], self.describe(index)
        shard = decode_columns(columns, self._codec, where=where)
        found = (len(shard), shard.targets.num_frames, shard.targets.num_entries)
        expected = (record.num_utterances, record.num_frames, record.num_entries)
        if found != expected:
            raise IntegrityError(f"{where}: (utterances, frames, entries) are {found}, its record says {expected}")
        return shard

    def describe(self, index: int) -> str:
        """The shard for messages."""
        return f"{self._store.describe(self._records[index].folder)} (shard {index})"

    def read_block(self, index: int, block: BlockPlace) -> Shard:
        """Read, check and decode a block, with one request.

        Raises:
            IntegrityError: as :meth:`read_shard`.
        """
        record = self._records[index]
        where = f"{self.describe(index)}, {block.num_bytes} bytes at {block.start}"
        data = None if self._cache is None else self._cache.get(block.digest.hex(), block.num_bytes)
        if data is None:
            key = f"{record.folder}/{record.files[0].name}"
            try:
                data = undamaged(self._store, lambda: self._fetch_block(key, block, where))
            except FileNotFoundError as error:
                raise IntegrityError(f"{where}: a file is missing: {error}") from None
            if self._cache is not None:
                self._cache.put(block.digest.hex(), data)
        columns = self._container.decode_block(data, block.num_rows, self._codec.streams, where=where)
        return decode_columns(columns, self._codec, where=where)

    def _fetch_block(self, key: str, block: BlockPlace, where: str) -> bytes:
        data = self._store.read_range(key, block.start, block.start + block.num_bytes)
        if len(data) != block.num_bytes or block_digest(data) != block.digest:
            raise IntegrityError(
                f"{where}: was changed after writing: {len(data)} bytes do not have the digest in the index"
            )
        return data

    def _read_files(self, record: ShardRecord, where: str) -> dict[str, bytes]:
        """The shard's files, each as it was written; from the cache where it has them."""
        found = {}
        if self._cache is not None:
            kept = {file.name: self._cache.get(file.sha256, file.num_bytes) for file in record.files}
            found = {name: data for name, data in kept.items() if data is not None}
        missing = [file for file in record.files if file.name not in found]
        try:
            fetched = undamaged(self._store, lambda: self._fetch_files(record.folder, missing, where))
        except FileNotFoundError as error:
            raise IntegrityError(f"{where}: a file is missing: {error}") from None
        for file, data in zip(missing, fetched, strict=True):
            found[file.name] = data
            if self._cache is not None:
                self._cache.put(file.sha256, data)
        return {file.name: found[file.name] for file in record.files}

    def _fetch_files(self, folder: str, files: Sequence[FileRecord], where: str) -> list[bytes]:
        keys = [f"{folder}/{file.name}" for file in files]
        try:
            fetched = self._store.read_many(keys, max_bytes=[file.num_bytes for file in files])
        except IntegrityError as error:
            raise IntegrityError(f"{where}: a file was changed after writing: {error}") from None
        for file, data in zip(files, fetched, strict=True):
            found = sha256_hex(data)
            if (len(data), found) != (file.num_bytes, file.sha256):
                raise IntegrityError(
                    f"{where}: {file.name} was changed after writing: expected {file.num_bytes} bytes with sha256 "
                    f"{file.sha256}, found {len(data)} with {found}"
                )
        return list(fetched)
