"""Connection: the requests of an object store, each tried again after a failure that may pass.

The file systems that fsspec runs asynchronously (S3, Google Cloud Storage, Azure, HTTP) get a time limit for each attempt, so
that a stuck transfer is noticed and nothing waits for ever; others (SFTP, HDFS) have what limits their own packages give them.
"""

from __future__ import annotations

import copy
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from softlabel_schemas.errors import InputError, NotHereError
from softlabel_schemas.retrying import call_with_retries, error_code, http_status, is_refusal

# An attempt may take this long, and so much longer for each MiB: a slower transfer is as good as stuck.
_ATTEMPT_SECONDS = 30.0
_SECONDS_PER_MIB = 1.0
# After a refusal: to a connection that another store has made since, and to a new one.
_MAX_RECONNECTS = 2
# Plain storage. Locations come from files that others made, too (a corpus manifest names its audio), and fsspec also has
# protocols that act on what they read: reference:// renders the templates it finds, others unpack archives.
STORAGE_PROTOCOLS = (
    *("file", "local", "memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl"),
    *("http", "https", "webdav", "ftp", "sftp", "ssh", "smb", "hdfs", "webhdfs", "hf"),
    *("oss", "oci", "ocilake", "tos", "tosfs", "dbfs", "dropbox", "gdrive"),
)
# In the query of a URL.
_SECRET = re.compile("signature|sig=|token|x-amz-|credential|secret|passw|apikey=|(^|[&_-])(key|auth)=", re.IGNORECASE)


class Connection:
    """A file system and a place in it, by URL.

    Raises:
        InputError: the URL's protocol is not one of ``STORAGE_PROTOCOLS`` or its package is missing, or the URL holds a
            credential.
    """

    def __init__(self, url: str | Path, storage_options: Mapping[str, Any] | None) -> None:
        # "memory://" and "/" are places too.
        self.url = str(url) if str(url).endswith("://") or str(url) == "/" else str(url).rstrip("/")
        refuse_credentials(self.url)
        _refuse_other_protocols(self.url)
        refuse_malformed(self.url)
        self._options = dict(storage_options or {})
        self._is_s3 = self.url.startswith(("s3://", "s3a://"))
        self._is_http = self.url.startswith(("http://", "https://"))
        if self._is_s3:
            # botocore's own retries would multiply ours; "max_attempts" would be the number of repetitions.
            self._options["config_kwargs"] = {"retries": {"total_max_attempts": 1}} | dict(
                self._options.get("config_kwargs", {})
            )
        self._lock = threading.Lock()
        self._connect()
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def _connect(self) -> None:
        # Copied: what is made of them may change them, and fsspec knows its connections by them.
        options = {
            name: copy.deepcopy(each) if isinstance(each, dict) else each for name, each in self._options.items()
        }
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            raise NotHereError(f"cannot use the URL {self.url}: {error}") from None
        except ValueError as error:
            raise InputError(f"cannot use the URL {self.url}: {error}") from None
        if self._is_s3:
            # How often s3fs makes a request, five times by default, on top of botocore and of ours.
            self._fs.retries = 1
        self._root = root.rstrip("/")
        self._pid = os.getpid()

    def path(self, key: str) -> str:
        """Raises InputError where it has a NUL character, at which every file system would fail in its own way."""
        path = f"{self._root}/{key}" if key else self._root
        if "\0" in path:
            raise InputError(
                f"cannot use the URL {self.describe(key)!r}: it has a NUL character, which no name of a file has"
            )
        return path

    def describe(self, key: str) -> str:
        """The object's address for messages."""
        return f"{self.url}/{key}"

    def _call(
        self, method: str, key: str | None, num_bytes: int = 0, *args: Any, seconds: float = 0.0, **kwargs: Any
    ) -> Any:
        """A method of the file system on one object (``key`` None: on none), tried again where that may help.

        Raises:
            FileNotFoundError, PermissionError, OSError: with the object's address.
        """
        where = self.url if key is None else self.describe(key)
        paths = () if key is None else (self.path(key),)

        def request(file_system: Any) -> Any:
            limit = {}
            if isinstance(file_system, AsyncFileSystem):
                limit = {"timeout": seconds or _ATTEMPT_SECONDS + _SECONDS_PER_MIB * num_bytes / 2**20}
            try:
                return getattr(file_system, method)(*paths, *args, **kwargs, **limit)
            except FileNotFoundError as error:
                # Over HTTP fsspec's info says so of every failure.
                failure = error.__cause__ if self._is_http else None
                if failure is None or http_status(failure) == 404:
                    raise
            # Out here, so that it is not the cause of its own context.
            raise failure

        def attempt() -> Any:
            if self._pid != os.getpid():
                # Forked: the parent's connections and event loop are not ours.
                self._connect()
            is_last = False
            for repetition in range(_MAX_RECONNECTS + 1):
                file_system = self._fs
                try:
                    return request(file_system)
                except Exception as error:
                    if self.is_local or not is_refusal(error):
                        raise
                    if is_last or repetition == _MAX_RECONNECTS:
                        raise PermissionError(str(error)) from error
                # Temporary credentials expire: a new connection reads them anew from wherever they come from.
                is_last = self._reconnect(file_system)
            raise AssertionError("unreachable")

        try:
            return attempt() if self.is_local else call_with_retries(attempt, where=where)
        except FileNotFoundError as error:
            if method == "pipe_file" or error_code(error) == "NoSuchBucket":
                where = f"the bucket or folder of {where}"
            raise FileNotFoundError(f"{where} does not exist") from None
        except PermissionError as error:
            if self.is_local:
                # A disk has no credentials; its message names the file.
                raise
            status = http_status(error)
            reason = error_code(error) or (error if status is None else f"HTTP status {status}")
            raise PermissionError(f"{where}: access was refused ({reason}); {self._what_to_do_when_refused}") from error
        except OSError as error:
            named = self.is_local or error.errno is None
            if named or isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
                raise
            # A full destination, for instance, is reported without its name.
            raise OSError(error.errno, f"{where}: {error.strerror or error}") from error

    @property
    def _what_to_do_when_refused(self) -> str:
        if self._is_http:
            # A bucket answers so for what is not there, too, to who may not list it.
            return (
                "there may be no such object, or reading it may need credentials: check the URL, or give that of the storage "
                "itself, such as s3://bucket/prefix"
            )
        return (
            "credentials may be missing, expired or not meant for this: renew them where the process gets them from, and run "
            "again"
        )

    def _reconnect(self, failed: Any) -> bool:
        """Whether the connection is a new one. It may be one that another thread or store made since: fsspec keeps one for
        all of them, and a client takes 12 MiB."""
        with self._lock:
            if self._fs is failed:
                self._connect()
            if self._fs is not failed:
                return False
            type(failed).clear_instance_cache()
            self._connect()
            return True


def _refuse_other_protocols(url: str) -> None:
    """Raises InputError."""
    protocol = fsspec.core.split_protocol(url)[0]
    if "::" in url:
        found = "a chain of them ('::')"
    elif protocol is not None and protocol not in STORAGE_PROTOCOLS:
        found = f"'{protocol}'"
    else:
        return
    raise InputError(
        f"cannot use the URL {url}: expected a path, or one protocol of {', '.join(STORAGE_PROTOCOLS)}; found {found}"
    )


def refuse_malformed(url: str) -> None:
    """Raises InputError where an HTTP client would take it for no URL."""
    if not url.startswith(("http://", "https://")):
        return
    try:
        parts = urlsplit(url)
        # Asked for, a port that is no number raises.
        if parts.port == 0 or not parts.hostname:
            raise ValueError
    except ValueError:
        raise _malformed() from None


def _malformed() -> InputError:
    return InputError("a URL is malformed between :// and the path; expected a host or a bucket there")


def refuse_credentials(url: str) -> None:
    """Addresses stand in messages, logs and reports. Raises InputError, without the URL."""
    for each in url.split("::"):
        if "://" not in each:
            continue
        try:
            parts = urlsplit(each)
        except ValueError:
            # Its message has what stands before the host, too.
            raise _malformed() from None
        user, separator, _ = parts.netloc.rpartition("@")
        # To HTTP servers a token can be the user; for others "container@account" is an address.
        in_user = separator and (":" in user or parts.scheme in ("http", "https"))
        if in_user or _SECRET.search(parts.query):
            raise InputError(
                f"the {parts.scheme}:// URL holds a credential; leave it out and set it in the environment instead "
                "(for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role)"
            )
