"""ObjectStore: the few operations that datasets need, on a folder or any storage of fsspec.

* ``put`` replaces atomically: a reader sees the old or the new object, never a part. Object stores do that by
  themselves; on a local disk the bytes go to a temporary name, are flushed, and are renamed.
* ``put_if_absent`` creates atomically or reports that the object exists. Locally that is a hard link, which fails on an
  existing name; on S3 a conditional PUT. Only small records use it: above about 100 MiB s3fs would turn it into a multipart
  upload, where some servers ignore the condition.

How requests are made, repeated and limited in time: :mod:`softlabel_schemas.connection`.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

from fsspec.implementations.memory import MemoryFileSystem

from softlabel_schemas.connection import Connection
from softlabel_schemas.connection import refuse_credentials as refuse_credentials
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.local_files import TEMPORARY, link_new, sync_folder, temporary_file
from softlabel_schemas.retrying import http_status, is_precondition_failure

# The largest object that is created conditionally; documents are read up to this size.
MAX_DOCUMENT_BYTES = 96 << 20
_CONCURRENT_REQUESTS = 16
# Larger reads are made of requests of this size, so that a failure loses one of them.
_PIECE_BYTES = 64 << 20
_UPLOADS_PER_PAGE = 1000
# A listing is many requests.
_LISTING_SECONDS = 600.0
_MEMORY_LOCK = threading.Lock()


class StoredObject(NamedTuple):
    """What a listing says of an object."""

    num_bytes: int
    modified: datetime


class ObjectStore(Connection):
    """Objects under one URL, by relative path.

    Args:
        url: a folder or the URL of a storage (``STORAGE_PROTOCOLS``) such as ``s3://bucket/prefix``.
        storage_options: passed to the fsspec file system; credentials are better left to its environment.
        last_writer_wins: make ``put_if_absent`` look first and then write, for servers without conditional writes; two
            writers at once can then both believe that they were first. Not for folders, whose file systems have hard links.

    Raises:
        InputError: the URL's protocol is another or its package is missing, or the URL holds a credential.
    """

    def __init__(
        self,
        url: str | Path,
        storage_options: Mapping[str, Any] | None = None,
        *,
        last_writer_wins: bool = False,
    ) -> None:
        super().__init__(url, storage_options)
        self.last_writer_wins = last_writer_wins and not self.is_local

    # Reading

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: there is no such object.
            IntegrityError: it is larger than ``max_bytes``; found out before more than that is fetched.
        """
        if self.is_local:
            size = self.size(key)
            if max_bytes is not None and size > max_bytes:
                raise IntegrityError(f"{self.describe(key)} has {size} bytes, expected at most {max_bytes}")
            # Python allocates what it is asked for before it reads.
            return self._request_range(key, 0, size)
        if max_bytes is None:
            return self._read_pieces(key, 0, None)
        data = self._read_pieces(key, 0, max_bytes + 1)
        if len(data) > max_bytes:
            raise IntegrityError(f"{self.describe(key)} has more than the {max_bytes} bytes expected of it")
        return data

    def read_if_there(self, key: str, *, max_bytes: int | None = None) -> bytes | None:
        """The whole object, or None where there is no such object. Raises as :meth:`read`."""
        try:
            return self.read(key, max_bytes=max_bytes)
        except FileNotFoundError:
            return None
        except PermissionError:
            # To who may not list a bucket S3 says of what is not there that access to it is refused. A disk does not.
            if self.is_local:
                raise
            return None

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop - 1``, fewer where the object ends before.

        Raises:
            FileNotFoundError: there is no such object.
            InputError: the server sends the whole of a large object instead.
        """
        if stop <= start:
            return b""
        if self.is_local:
            return self._request_range(key, start, stop)
        data = self._read_pieces(key, start, stop)
        if len(data) <= stop - start:
            return data
        # The whole object, of an HTTP server that knows no ranges. A shard comes in reasonable time, and what is cut out is
        # checked against its digest; an archive of gigabytes would come anew for each of its utterances.
        if len(data) > _PIECE_BYTES:
            raise InputError(
                f"{self.describe(key)}: {stop - start} bytes at {start} were asked for, the server sent all {len(data)}: it "
                "knows no range requests; copy the files to a disk or an object store, or use a server that has them, such "
                "as nginx"
            )
        return data[start:stop]

    def _read_pieces(self, key: str, start: int, stop: int | None) -> bytes:
        """Bytes from ``start`` on, up to ``stop`` or the end, which is where a request brings less than was asked for: a small
        object takes one request. What has arrived is kept when a later request fails and is repeated.
        """
        # Its getvalue() makes no copy: a model of many gigabytes is in memory once.
        pieces = io.BytesIO()
        while stop is None or start < stop:
            num_bytes = _PIECE_BYTES if stop is None else min(_PIECE_BYTES, stop - start)
            data = self._request_range(key, start, start + num_bytes)
            start += num_bytes
            # More than that comes from HTTP servers that know no ranges, and is everything.
            is_last = len(data) != num_bytes or start == stop
            if is_last and not pieces.tell():
                return data
            pieces.write(data)
            if is_last:
                break
        return pieces.getvalue()

    def _request_range(self, key: str, start: int, stop: int) -> bytes:
        try:
            data: bytes = self._call("cat_file", key, stop - start, start=start, end=stop)
        except (IsADirectoryError, NotADirectoryError):
            raise FileNotFoundError(f"{self.describe(key)} does not exist") from None
        except OSError as error:
            if http_status(error) == 416:
                # An empty object, or a range behind the end, to a server that is strict about ranges.
                return b""
            raise
        return data

    def read_many(self, keys: Sequence[str], *, max_bytes: Sequence[int] | None = None) -> builtins.list[bytes]:
        """Objects in the order of ``keys``, fetched concurrently. Raises as :meth:`read`."""
        limits: Sequence[int | None] = [None] * len(keys) if max_bytes is None else max_bytes
        return self._concurrently(
            lambda item: self.read(item[0], max_bytes=item[1]), builtins.list(zip(keys, limits, strict=True))
        )

    def size(self, key: str) -> int:
        """Bytes of the object. Raises FileNotFoundError."""
        try:
            info = self._call("info", key)
        except NotADirectoryError:
            info = None
        if info is None or info["type"] != "file":
            raise FileNotFoundError(f"{self.describe(key)} does not exist")
        return int(info["size"])

    def exists(self, key: str) -> bool:
        """Raises PermissionError, OSError where that cannot be found out, which fsspec's own takes for absence."""
        self._fs.invalidate_cache()
        try:
            if self._is_http:
                # One request; info makes two where there is no such object.
                self._request_range(key, 0, 1)
            else:
                self._call("info", key)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def list(self, prefix: str, *, temporaries: bool = False) -> dict[str, StoredObject]:
        """The objects under ``prefix`` by relative path.

        Args:
            temporaries: include what local writers have not renamed yet, or never will.

        Raises:
            PermissionError, OSError: a folder under it cannot be read; what is in it would look as if it did not exist.
        """
        self._fs.invalidate_cache()
        try:
            found = (
                self._find_on_disk(prefix)
                if self.is_local
                else self._call("find", prefix, seconds=_LISTING_SECONDS, detail=True)
            )
        except FileNotFoundError:
            return {}
        start = len(self._root) + 1
        return {
            path[start:]: StoredObject(int(info.get("size") or 0), _modified(info))
            for path, info in sorted(found.items())
            if temporaries or TEMPORARY not in path[start:]
        }

    def _find_on_disk(self, prefix: str) -> dict[str, Any]:
        """As fsspec's ``find``, which passes over folders that cannot be read."""
        found, folders = {}, [self.path(prefix)]
        while folders:
            try:
                listing = self._fs.ls(folders.pop(), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                # Not there, or removed meanwhile.
                continue
            for info in listing:
                if info["type"] == "directory":
                    folders.append(info["name"])
                else:
                    found[info["name"]] = info
        return found

    def children(self, prefix: str) -> tuple[builtins.list[str], builtins.list[str]]:
        """Names of the folders and of the objects directly under ``prefix``, sorted; what is in the folders is not listed.
        Symbolic links of a local disk are neither.
        """
        self._fs.invalidate_cache()
        try:
            found = self._call("ls", prefix, seconds=_LISTING_SECONDS, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        # An object store may hold an empty object for the folder itself.
        own = self.path(prefix).strip("/")
        kinds = {
            info["name"].rstrip("/").rpartition("/")[2]: info["type"]
            for info in found
            if info["name"].strip("/") != own
        }
        folders = sorted(name for name, kind in kinds.items() if kind == "directory")
        return folders, sorted(name for name, kind in kinds.items() if kind == "file" and TEMPORARY not in name)

    # Writing

    def put(self, key: str, data: bytes) -> None:
        if self.is_local:
            with temporary_file(Path(self.path(key)), data) as temporary:
                temporary.replace(self.path(key))
        else:
            self._call("pipe_file", key, len(data), data)

    def put_many(self, objects: Mapping[str, bytes]) -> None:
        """``put`` each, concurrently."""
        self._concurrently(lambda item: self.put(*item), sorted(objects.items()))

    def sync(self, folder: str) -> None:
        """Make the names that ``put`` gave within ``folder`` survive a power loss; object stores need no such step."""
        if self.is_local:
            sync_folder(Path(self.path(folder)))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """True if this call created the object, False if it existed; never replaces.

        After a lost response the object may exist although this call created it: a caller that gets False reads the object
        back and compares (see ``commit.py``).

        Raises:
            ConditionalWriteError: the store cannot create conditionally, and says so.
            InputError: there is more to write than the format allows.
        """
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{self.describe(key)}: {len(data)} bytes are too many for a conditional write, expected at most "
                f"{MAX_DOCUMENT_BYTES}; fewer shards, or fewer skipped utterances, make a document smaller"
            )
        if self.last_writer_wins:
            if self.exists(key):
                return False
            self.put(key, data)
            return True
        try:
            if self.is_local:
                link_new(Path(self.path(key)), data)
            else:
                # fsspec's memory file system looks first and then writes.
                with _MEMORY_LOCK if isinstance(self._fs, MemoryFileSystem) else contextlib.nullcontext():
                    self._call("pipe_file", key, len(data), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if is_precondition_failure(error):
                return False
            unsupported = (errno.ENOSYS, errno.ENOTSUP, errno.EPERM if self.is_local else errno.ENOSYS)
            if error.errno in unsupported or http_status(error) == 501:
                raise ConditionalWriteError.because(self.url, str(error)) from error
            raise
        except TypeError as error:
            raise ConditionalWriteError.because(self.url, str(error)) from error
        return True

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that do not exist are passed over. Local folders that are left empty go too."""

        def remove(key: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._call("rm_file", key)

        self._concurrently(remove, keys)
        if self.is_local:
            for folder in sorted({key.rpartition("/")[0] for key in keys}, key=len, reverse=True):
                while folder:
                    try:
                        Path(self.path(folder)).rmdir()
                    except OSError:
                        break  # Not empty, or gone already.
                    folder = folder.rpartition("/")[0]

    # What killed writers leave on S3: uploads in parts that were never completed. They cost money and no listing shows them.

    def stale_uploads(self, prefix: str, older_than: timedelta) -> builtins.list[tuple[str, str]]:
        """Unfinished multipart uploads under ``prefix`` as (key, upload id); none where the store is not S3."""
        if not hasattr(self._fs, "list_multipart_uploads"):
            return []
        bucket, _, root = self._root.partition("/")
        folder = f"{root}/".lstrip("/")
        latest = datetime.now(UTC) - older_than
        found: builtins.list[tuple[str, str]] = []
        page: dict[str, Any] = {}
        while True:
            # s3fs' own list_multipart_uploads covers the whole bucket, and its first page only.
            answer = self._call(
                "call_s3",
                None,
                0,
                "list_multipart_uploads",
                Bucket=bucket,
                Prefix=folder + prefix,
                MaxUploads=_UPLOADS_PER_PAGE,
                **page,
            )
            found += [
                (upload["Key"].removeprefix(folder), upload["UploadId"])
                for upload in answer.get("Uploads", [])
                if upload["Initiated"] < latest
            ]
            if not answer.get("IsTruncated"):
                return found
            page = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    def abort_upload(self, key: str, upload_id: str) -> None:
        bucket, _, root = self._root.partition("/")
        self._call(
            "call_s3",
            None,
            0,
            "abort_multipart_upload",
            Bucket=bucket,
            Key=f"{root}/{key}".strip("/"),
            UploadId=upload_id,
        )

    def _concurrently(self, function: Callable[[Any], Any], items: Sequence[Any]) -> builtins.list[Any]:
        """Results in order. On a local disk one after the other: threads would only wait for each other there."""
        if len(items) <= 1 or self.is_local:
            return [function(item) for item in items]
        with ThreadPoolExecutor(max_workers=min(_CONCURRENT_REQUESTS, len(items))) as pool:
            return builtins.list(pool.map(function, items))


class ConditionalWriteError(InputError):
    """The destination cannot create an object only if it is absent, on which "committed once" rests."""

    @classmethod
    def because(cls, url: str, reason: str) -> Self:
        """Not the constructor: exceptions are rebuilt from their message when they come from another process."""
        if "://" not in url or url.startswith(("file://", "local://")):
            return cls(
                f"{url}: the file system of this folder cannot create a file only if it is absent ({reason}), so two jobs "
                "could overwrite each other's records. Use a folder on a file system with hard links; if it is a mounted "
                "bucket, give the bucket's own URL, such as s3://bucket/prefix"
            )
        return cls(
            f"{url}: this store does not support conditional creation ({reason}), so two jobs could overwrite each other's "
            "records. Use AWS S3, Ceph, MinIO, Google Cloud Storage or a local disk with hard links; or, if only one job ever "
            "writes there, set accept_last_writer_wins = true under [destination]"
        )


def _modified(info: Mapping[str, Any]) -> datetime:
    """fsspec names the time differently for each file system."""
    for name in ("LastModified", "mtime", "created", "updated", "last_modified"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value if value.tzinfo else value.replace(tzinfo=UTC)
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, tz=UTC)
    return datetime.fromtimestamp(0, tz=UTC)
