"""Names: ``PREFIX#NAME:VERSION`` for people, instead of a dataset's URL.

A dataset never changes; a name gets versions. Each is one small object under the prefix, created only if it is absent::

    <prefix>/names/<name>/<version>.json      sealed: the dataset's path under the prefix, and its content digest

so that a version never changes hands, whoever tags at the same time. ``PREFIX#NAME`` is the highest version. The path is
relative and cannot leave the prefix: a prefix may be copied or moved as a whole, and a name is no way to somewhere else. Who
opens a name compares the digest: other labels at that place are an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from softlabel_schemas import layout
from softlabel_schemas.commit import read_manifest
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.manifest import from_bytes, to_bytes
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.spec import Sha256
from softlabel_schemas.strict import StrictModel, parse, printable

NAMES = "names"
_MAX_VERSION = 999_999
_MAX_BYTES = 1 << 16
_ADDRESS = re.compile(r"(.+)#([a-z0-9][a-z0-9_-]{0,63})(?::([1-9][0-9]{0,5}))?")
_RECORD = re.compile(rf"{NAMES}/([a-z0-9][a-z0-9_-]{{0,63}})/([1-9][0-9]{{0,5}})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A name under a prefix; ``version`` None: the highest."""

    prefix: str
    name: str
    version: int | None

    def __str__(self) -> str:
        return f"{self.prefix}#{self.name}" + ("" if self.version is None else f":{self.version}")


def _inside(path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("a part is empty, '.' or '..', expected a path that stays within the prefix")
    if "\\" in path:
        raise ValueError("it has a \\, which separates folders on some systems; rename the folder")
    unfit = next((c for c in path if not c.isprintable()), None)
    if unfit is not None:
        raise ValueError(f"it has U+{ord(unfit):04X}, expected printable characters; rename the folder")
    return path


class NameRecord(StrictModel):
    """A version of a name. ``path``: the dataset's, relative to the prefix."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    version: Annotated[int, Field(ge=1, le=_MAX_VERSION)]
    path: Annotated[str, Field(max_length=1000), AfterValidator(_inside)]
    content_digest: Sha256

    @property
    def key(self) -> str:
        return f"{NAMES}/{self.name}/{self.version}.json"


def parse_address(text: str) -> Address | None:
    """None for a URL or a path: a folder that is there is itself, and a URL with a ``/`` behind it is no name."""
    match = _ADDRESS.fullmatch(text)
    if match is None or ("://" not in text and Path(text).is_dir()):
        return None
    prefix, name, version = match.groups()
    return Address(prefix=prefix, name=name, version=int(version) if version else None)


def wanted_address(text: str) -> Address:
    """Raises InputError where ``text`` is none."""
    address = parse_address(text)
    if address is None:
        raise InputError(
            f"{text!r} is not a name: expected PREFIX#NAME or PREFIX#NAME:VERSION, such as s3://bucket/team#english:3; a "
            "name has small letters, digits, _ and - (at most 64), a version is a number from 1"
        )
    return address


def resolve(address: Address, storage_options: Mapping[str, Any] | None = None) -> tuple[str, NameRecord]:
    """URL of the dataset, and the record that says so.

    Raises:
        InputError: there is no such name or version; says which there are.
        IntegrityError: the record is damaged.
    """
    store = ObjectStore(address.prefix, storage_options)
    versions = [address.version] if address.version else versions_of(store, address.name)
    record = _read(store, address.name, versions[-1]) if versions else None
    if record is None:
        raise InputError(f"there is no {address}: {_what_there_is(store, address)}")
    return f"{store.url.rstrip('/')}/{record.path}", record


def located(url: str, storage_options: Mapping[str, Any] | None = None) -> tuple[str, NameRecord | None]:
    """The URL of a dataset that is given by its URL or by a name, and the record of a name. Raises as :func:`resolve`."""
    address = parse_address(url)
    if address is None:
        return url, None
    try:
        return resolve(address, storage_options)
    except InputError:
        # The last part of a URL may look like a name.
        if ObjectStore(url, storage_options).exists(layout.MANIFEST):
            return url, None
        raise


def tag(url: str, address: Address) -> NameRecord:
    """Give the dataset at ``url`` a version of a name: the one asked for, or the next. Who has it already keeps it.

    Raises:
        InputError: nothing is published there, it is not under the prefix, its path there is none for a name, or another
            dataset has that version.
        IntegrityError: the manifest or a record is damaged.
    """
    dataset, store = ObjectStore(url), ObjectStore(address.prefix)
    try:
        content_digest = read_manifest(dataset).content_digest
    except FileNotFoundError:
        raise InputError(
            f"{url} is not a published dataset; only published ones, which never change, get a name"
        ) from None
    path = _path_under(dataset, store)
    version = address.version
    if version is None:
        versions = versions_of(store, address.name)
        latest = _read(store, address.name, versions[-1]) if versions else None
        if latest is not None and (latest.path, latest.content_digest) == (path, content_digest):
            return latest
        version = versions[-1] + 1 if versions else 1
    while version <= _MAX_VERSION:
        fields = {"name": address.name, "version": version, "path": path, "content_digest": content_digest}
        record = parse(NameRecord, fields, where=f"{address} for {printable(dataset.url)}")
        # Looked for first: a server that ignores the condition would replace another's record.
        if not store.exists(record.key) and store.put_if_absent(record.key, to_bytes(record)):
            return record
        standing = _read(store, address.name, version)
        # A lost response, or the same tag given at the same time.
        if standing == record:
            return record
        if address.version is not None:
            found = "unknown" if standing is None else f"{standing.path}, content digest {standing.content_digest[:12]}"
            raise InputError(
                f"{address} is taken ({found}), and a version never changes hands; leave the version out to get the next"
            )
        version += 1
    raise InputError(f"{address} has {_MAX_VERSION} versions, which is as many as a name can have")


def versions_of(store: ObjectStore, name: str) -> list[int]:
    """Ascending; one listing."""
    matches = (_RECORD.fullmatch(key) for key in store.list(f"{NAMES}/{name}"))
    return sorted(int(match.group(2)) for match in matches if match and match.group(1) == name)


def list_names(store: ObjectStore) -> list[NameRecord]:
    """Every version of every name under a prefix, by name and version. Raises IntegrityError for a damaged record."""
    matches = (_RECORD.fullmatch(key) for key in store.list(NAMES))
    found = sorted((match.group(1), int(match.group(2))) for match in matches if match)
    return [record for name, version in found if (record := _read(store, name, version)) is not None]


def _read(store: ObjectStore, name: str, version: int) -> NameRecord | None:
    key = f"{NAMES}/{name}/{version}.json"
    try:
        record = from_bytes(NameRecord, store.read(key, max_bytes=_MAX_BYTES), where=store.describe(key))
    except FileNotFoundError:
        return None
    if (record.name, record.version) != (name, version):
        raise IntegrityError(f"{store.describe(key)} is the record of {record.name}:{record.version}")
    return record


def _what_there_is(store: ObjectStore, address: Address) -> str:
    versions = versions_of(store, address.name)
    if versions:
        return f"{address.name} has the versions {', '.join(map(str, versions[-20:]))}"
    names = sorted({match.group(1) for key in store.list(NAMES) if (match := _RECORD.fullmatch(key))})
    return f"the names there are {', '.join(names[:20])}" if names else f"no name was given under {store.url}"


def _path_under(dataset: ObjectStore, prefix: ObjectStore) -> str:
    root, path = prefix.path("").rstrip("/"), dataset.path("")
    if dataset.is_local and prefix.is_local:
        root, path = str(Path(root).resolve()), str(Path(path).resolve())
    same_scheme = urlsplit(dataset.url).scheme == urlsplit(prefix.url).scheme or dataset.is_local
    if not same_scheme or dataset.is_local != prefix.is_local or not path.startswith(f"{root}/"):
        raise InputError(f"{dataset.url} is not under {prefix.url}; a name leads to datasets under its own prefix")
    return path.removeprefix(f"{root}/")
