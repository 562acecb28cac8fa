"""ObjectStore: the four operations that datasets need, on a folder or any fsspec URL.

* ``put`` replaces atomically: a reader sees the old or the new object, never a part. Object stores do that by
  themselves; on a local disk the bytes go to a temporary name, are flushed, and are renamed.
* ``put_if_absent`` creates atomically or reports that the object exists. Locally that is a hard link, which fails on an
  existing name; on S3 a conditional PUT. Only small records use it: above about 100 MiB s3fs would turn it into a multipart
  upload, where some servers ignore the condition.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from softlabel_schemas.errors import InputError

_MAX_CONDITIONAL_BYTES = 96 << 20
_CONCURRENT_READS = 16
# Part of every temporary name, so that leftovers of killed writers can be told from data.
TEMPORARY = ".tmp-"


class ObjectStore:
    """Objects under one URL, by relative path.

    Args:
        url: a folder or an fsspec URL such as ``s3://bucket/prefix``.
        storage_options: passed to the fsspec file system; credentials are better left to its environment.

    Raises:
        InputError: the URL's protocol is unknown or its package is missing.
    """

    def __init__(self, url: str | Path, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = str(url).rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url, **dict(storage_options or {}))
        except (ValueError, ImportError) as error:
            raise InputError(f"cannot use the URL {self.url}: {error}") from None
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def describe(self, key: str) -> str:
        """The object's address for messages."""
        return f"{self.url}/{key}"

    def read(self, key: str) -> bytes:
        """Raises FileNotFoundError."""
        try:
            data: bytes = self._fs.cat_file(self.path(key))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FileNotFoundError(f"{self.describe(key)} does not exist") from None
        except PermissionError as error:
            raise PermissionError(f"{self.describe(key)} may not be read ({error}); check the credentials") from None
        return data

    def read_many(self, keys: Sequence[str]) -> list[bytes]:
        """Objects in the order of ``keys``, fetched concurrently. Raises FileNotFoundError."""
        if len(keys) <= 1 or self._local:
            return [self.read(key) for key in keys]
        with ThreadPoolExecutor(max_workers=min(_CONCURRENT_READS, len(keys))) as pool:
            return list(pool.map(self.read, keys))

    def exists(self, key: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self.path(key)))

    def list(self, prefix: str) -> dict[str, datetime]:
        """Relative paths of the objects under ``prefix``, and when each was last modified; temporaries left out."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self.path(prefix), detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._root) + 1
        return {path[start:]: _modified(info) for path, info in sorted(found.items()) if TEMPORARY not in path}

    def put(self, key: str, data: bytes) -> None:
        if self._local:
            with _temporary_file(Path(self.path(key)), data) as temporary:
                temporary.replace(self.path(key))
        else:
            self._fs.pipe_file(self.path(key), data)

    def sync(self, folder: str) -> None:
        """Make the names that ``put`` gave within ``folder`` survive a power loss; object stores need no such step."""
        if self._local:
            _sync_folder(Path(self.path(folder)))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """True if this call created the object, False if it existed; never replaces.

        After a lost response the object may exist although this call created it: a caller that gets False reads the object
        back and compares (see ``commit.py``).
        """
        if len(data) > _MAX_CONDITIONAL_BYTES:
            raise ValueError(f"{self.describe(key)}: {len(data)} bytes are too many for a conditional write")
        try:
            if self._local:
                with _temporary_file(Path(self.path(key)), data) as temporary:
                    os.link(temporary, self.path(key))
                _sync_folder(Path(self.path(key)).parent)
            else:
                self._fs.pipe_file(self.path(key), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if _is_precondition_failure(error):
                return False
            raise
        return True


@contextlib.contextmanager
def _temporary_file(path: Path, data: bytes) -> Any:
    """A flushed file beside ``path`` with ``data``; gone afterwards unless it was renamed."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        # The new folder's own entry must survive a power loss as well as the file in it.
        _sync_folder(path.parent.parent)
    temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        if error.filename is None:
            # A full disk is reported without a name.
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_precondition_failure(error: BaseException | None) -> bool:
    """Whether a server refused a conditional PUT. Ceph's 412 arrives as OSError(22): only its cause tells."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if code == 412 or response.get("Error", {}).get("Code") == "PreconditionFailed":
                return True
        error = error.__cause__ or error.__context__
    return False


def _modified(info: Mapping[str, Any]) -> datetime:
    """fsspec names the time differently for each file system."""
    for name in ("LastModified", "mtime", "created", "updated", "last_modified"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value if value.tzinfo else value.replace(tzinfo=UTC)
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, tz=UTC)
    return datetime.fromtimestamp(0, tz=UTC)
