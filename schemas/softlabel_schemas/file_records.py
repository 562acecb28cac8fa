"""The files of a shard, as its record lists them.

The manifest of 25,000 Zarr shards lists 775,000 files. As objects they took a gigabyte while it was opened and six of the
seven seconds, and a reader needs those of a few shards at a time. So each list stays the canonical JSON that it is stored as:
a compiled loop checks every byte of it when the document is read, and the records are made when they are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, GetCoreSchemaHandler, SerializationInfo, ValidationInfo, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, core_schema

from softlabel_schemas.digest import canonical_json, parse_json, sha256_hex
from softlabel_schemas.file_kernels import SHORTEST_LIST, find_lists
from softlabel_schemas.limits import MAX_COUNT
from softlabel_schemas.spec import Count, Sha256
from softlabel_schemas.strict import StrictModel

_MAX_NAME = 200


class FileRecord(StrictModel):
    """One stored file of a shard; ``name`` is relative to the shard's folder and cannot leave it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+([./][A-Za-z0-9_]+)*$", max_length=_MAX_NAME)]
    num_bytes: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class FileRecords:
    """At least one, sorted by name, each once.

    Attributes:
        canonical: their canonical JSON, valid.
        num_bytes: of all files together.
    """

    canonical: bytes
    num_bytes: int

    @classmethod
    def of(cls, records: Sequence[FileRecord]) -> Self:
        """Raises ValueError where they are not sorted by name, or one is there twice: it would be read twice."""
        if any(first.name >= second.name for first, second in itertools.pairwise(records)):
            raise ValueError("the files are not sorted by name, each once")
        canonical = canonical_json([record.model_dump(mode="json") for record in records])
        return cls(canonical, sum(record.num_bytes for record in records))

    def digest(self) -> str:
        """The shard's name: see FORMAT.md, "Why shards are named by content"."""
        return sha256_hex(self.canonical)

    def __len__(self) -> int:
        # No name holds one.
        return self.canonical.count(b"{")

    def __iter__(self) -> Iterator[FileRecord]:
        return (FileRecord(**fields) for fields in parse_json(self.canonical))

    def __getitem__(self, index: int) -> FileRecord:
        return FileRecord(**parse_json(self.canonical)[index])

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A model is given them as a list of records or of JSON values, and gives them as JSON values."""
        return core_schema.with_info_wrap_validator_function(
            cls._validate,
            handler.generate_schema(Annotated[tuple[FileRecord, ...], Field(min_length=1)]),
            serialization=core_schema.plain_serializer_function_ser_schema(cls._to_json, info_arg=True),
        )

    @classmethod
    def _validate(cls, value: object, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> FileRecords:
        if isinstance(value, FileRecords):
            return value
        taken = next(info.context.lists, None) if isinstance(info.context, FilesApart) and value == [] else None
        return cls.of(validate(value)) if taken is None else taken

    def _to_json(self, info: SerializationInfo) -> list[dict[str, Any]]:
        return [] if isinstance(info.context, FilesApart) else parse_json(self.canonical)


@dataclass(frozen=True, slots=True)
class FilesApart:
    """As pydantic's context: every list of files of a document is empty in its JSON, and is the next of ``lists``."""

    lists: Iterator[FileRecords]


def take_out_files(body: bytes) -> tuple[bytes, list[FileRecords]]:
    """A document with ``[]`` in place of each list of files, and the lists in order.

    As it is, and no list, where any of them is not what our writers write: who parses it whole finds out what is wrong. So what
    comes back with lists has ``"files":[]`` once for each of them, and nowhere else.
    """
    places = np.empty((len(body) // SHORTEST_LIST, 3), np.int64)
    num_lists = find_lists(np.frombuffer(body, np.uint8), _MAX_NAME, MAX_COUNT, places)
    pieces, lists, done = [], [], 0
    for start, end, num_bytes in places[: max(0, num_lists)].tolist():
        pieces.append(body[done:start])
        lists.append(FileRecords(body[start:end], num_bytes))
        done = end
    return b"[]".join([*pieces, body[done:]]), lists
