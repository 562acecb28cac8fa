"""Files on a local disk that appear whole or not at all, and survive a power loss.

Bytes go to a temporary name beside their own, are flushed, and get their name by a rename (which replaces) or a hard link
(which fails on an existing name).
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path
from typing import Any

# Part of every temporary name, so that leftovers of killed writers can be told from data.
TEMPORARY = ".tmp-"


def link_new(path: Path, data: bytes) -> None:
    with temporary_file(path, data) as temporary:
        os.link(temporary, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def temporary_file(path: Path, data: bytes) -> Any:
    """A flushed file beside ``path`` with ``data``; gone afterwards unless it was renamed."""
    _make_folder(path.parent)
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


def _make_folder(folder: Path) -> None:
    """With those above it, so that their own entries survive a power loss as well as the files in them."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        try:
            each.mkdir(exist_ok=True)
        except FileExistsError:
            # A file; as it is, the error would say that the object in the folder exists.
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(each)) from None
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
