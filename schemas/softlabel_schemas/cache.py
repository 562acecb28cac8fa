"""FileCache: files and blocks of shards kept on a local disk, by digest, for any number of processes at once.

::

    <folder>/lock                    held while files are added or evicted; holds the number of bytes below
    <folder>/<2 hex>/<sha256>        a file, or a block by the half of its digest that the utterance index has; the modification
                                     time is when it was last used

Reading takes no lock: whatever is found is compared with its digest, and what does not fit is dropped and counts as not
there. So nothing needs to be flushed, a kill can do no harm, and a file that another process evicts is read whole or not found.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.errors import InputError
from softlabel_schemas.local_files import TEMPORARY

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"^([0-9a-f]{32}){1,2}$")
_LEFTOVER = re.compile(r"^([0-9a-f]{32}){1,2}" + re.escape(TEMPORARY) + r"[0-9a-f]{32}$")
# Eviction looks at every file, so it makes room for more than the next one.
_EVICT_TO = 7 / 8
# A temporary name this old was left by a killed process: writing one file takes seconds.
_LEFTOVER_SECONDS = 3600.0


class FileCache:
    """At most ``max_bytes`` of files under ``folder``, the least recently used evicted first.

    Each thread that is just adding a file may have that one beside them. A folder that cannot be written to, or a full disk,
    ends the adding for this process with one warning in the log; reading goes on.

    Args:
        folder: a local folder, made when the first file is added; several processes and datasets may share it.
        max_bytes: a larger file is not kept.

    Raises:
        InputError: ``folder`` is a URL, or ``max_bytes`` is not positive.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if "://" in str(folder):
            raise InputError(f"the cache must be a local folder, found {folder}")
        if max_bytes <= 0:
            raise InputError(f"a cache needs a positive number of bytes, found {max_bytes}")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._writable = True

    def get(self, sha256: str, num_bytes: int) -> bytes | None:
        """The file, or None where it is not here (any more) as it should be; never raises for what it finds.

        Args:
            sha256: the digest's hex digits, or the first 32 of them.
        """
        path = self._path(sha256)
        try:
            with path.open("rb") as file:
                data = file.read(num_bytes + 1)
        except OSError:
            return None
        if len(data) != num_bytes or not sha256_hex(data).startswith(sha256):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        # Evicted since, or someone else's file: it was read all the same.
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Keep ``data``, whose digest the caller has checked. Where that fails it is not kept."""
        if not self._writable or len(data) > self.max_bytes:
            return
        path = self._path(sha256)
        temporary = path.with_name(f"{sha256}{TEMPORARY}{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                with self._locked() as lock:
                    if not path.exists():
                        self._make_room(lock, len(data))
                        temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            self._writable = False
            _LOG.warning("nothing more is added to the cache %s: %s", self.folder, error)

    def _path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The lock file's descriptor. The lock goes with the process that holds it, however that ends."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _make_room(self, lock: int, num_bytes: int) -> None:
        """Count ``num_bytes`` more, and evict where they are too many. The count is written before the file gets its name:
        after a kill in between it is too high, never too low, and the next eviction corrects it."""
        text = os.pread(lock, 32, 0)
        used = int(text) if text.isdigit() else self.max_bytes
        if used + num_bytes > self.max_bytes:
            used = self._evict(num_bytes)
        os.pwrite(lock, b"%020d" % (used + num_bytes), 0)

    def _evict(self, num_bytes: int) -> int:
        """Bytes left after removing the files used longest ago, so that there is room for ``num_bytes``."""
        files = sorted(self._scan())
        used = sum(size for _, size, _ in files)
        if used + num_bytes <= self.max_bytes:
            return used
        for _, size, path in files:
            if used + num_bytes <= self.max_bytes * _EVICT_TO or not used:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _scan(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every file; leftovers of killed processes are removed on the way. Anything that
        this class did not make is passed over."""
        for folder in self.folder.iterdir():
            if len(folder.name) != 2 or not folder.is_dir():
                continue
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if _NAME.match(path.name):
                        yield status.st_mtime_ns, status.st_size, path
                    elif _LEFTOVER.match(path.name) and time.time() - status.st_mtime > _LEFTOVER_SECONDS:
                        path.unlink()
