"""Features in files that the runs of a sweep share: runs that find none compute them, later ones map them into memory.

::

    <folder>/KEY-DIGEST    float32 [N, D], the frames of all utterances of a corpus; then int64 [utterances], how many each has

KEY is of what they are made from: the front end, the speed, each utterance's audio, by its sha256 and its part of the
recording, and the versions of the libraries. DIGEST is of the file's own bytes; one that is damaged counts as not there. They
are, bit for bit, what a run would compute itself. No lock is held: runs that begin together each compute them, and the first
file stays.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from softlabel_schemas.corpus import Corpus
from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.errors import InputError
from softlabel_schemas.front_end import AnyFrontEnd, Fbank, Float32
from softlabel_schemas.local_files import TEMPORARY
from softlabel_schemas.targets import offsets_of

# What the samples of an utterance are.
_AUDIO = ("sha256", "start_sample", "num_samples", "sample_rate")
# A greater one where this package makes others of the same.
_VERSION = 1
_LIBRARIES = ("kaldi-native-fbank", "numpy", "soundfile", "soxr")
_NAME = re.compile(rf"[0-9a-f]{{32}}(-[0-9a-f]{{64}}|{re.escape(TEMPORARY)}[0-9a-f]{{32}})")


class CorpusFeatures:
    """Those of each row of a corpus, float32 [T, D]; not to be written to.

    Args:
        data: of a file, uint8.
    """

    def __init__(self, data: npt.NDArray[np.uint8], num_rows: int, num_features: int) -> None:
        num_bytes = len(data) - 8 * num_rows
        # As plain arrays: slices of a memmap cost ten times as much.
        self._frames_ND = np.asarray(data[:num_bytes]).view(np.float32).reshape(-1, num_features)
        self._offsets = offsets_of(np.asarray(data[num_bytes:]).view(np.int64))

    def __getitem__(self, row: int) -> Float32:
        return self._frames_ND[self._offsets[row] : self._offsets[row + 1]]


class SharedFeatures:
    """
    Args:
        folder: made when the first file is written; on a cluster, on a disk that the nodes share.
        max_seconds: speech of the largest corpus whose features are kept. At 40 mel bins and 100 frames a second an hour takes
            58 MB, for each speed.
    """

    def __init__(self, folder: Path, max_seconds: float) -> None:
        self.folder, self.max_seconds = folder, max_seconds
        self._writable = True

    def of(
        self,
        corpus: Corpus,
        front_end: AnyFrontEnd,
        speed: float,
        compute: Callable[[int], Float32],
        given_up: threading.Event | None = None,
    ) -> CorpusFeatures | None:
        """Features of all rows. None where they are not kept, and are the caller's to compute: of a corpus that is too large,
        or does not say what its audio files hold; of one with an utterance that has none; of stored features and waveforms;
        where they cannot be written; or once ``given_up`` is set.

        Args:
            compute: features of a row; raises what reading audio raises.
        """
        if not isinstance(front_end, Fbank) or corpus.table["sha256"].null_count:
            return None
        if corpus.seconds().sum() > self.max_seconds:
            return None
        key = _key(corpus, front_end, speed)
        found = self._found(key)
        if found is None and self._writable and self._write(key, len(corpus), compute, given_up):
            found = self._found(key)
        return None if found is None else CorpusFeatures(found, len(corpus), front_end.num_features)

    def remove(self) -> None:
        """Own files, and the folder where nothing else is in it; what cannot be removed stays."""
        with contextlib.suppress(OSError):
            for path in list(self.folder.iterdir()):
                if _NAME.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _found(self, key: str) -> npt.NDArray[np.uint8] | None:
        for path in sorted(self.folder.glob(f"{key}-{'?' * 64}")):
            # One that cannot be read, or mapped, as of no bytes at all, is as good as none.
            with contextlib.suppress(OSError, ValueError):
                data = np.memmap(path, dtype=np.uint8, mode="r")
                if path.name == f"{key}-{hashlib.sha256(data.data).hexdigest()}":
                    return data
        return None

    def _write(
        self, key: str, num_rows: int, compute: Callable[[int], Float32], given_up: threading.Event | None
    ) -> bool:
        """Whether the file is there now."""
        temporary = self.folder / f"{key}{TEMPORARY}{uuid.uuid4().hex}"
        digest, lengths = hashlib.sha256(), np.zeros(num_rows, np.int64)
        try:
            with _not_written():
                self.folder.mkdir(parents=True, exist_ok=True)
                file = temporary.open("xb")
            try:
                for row in range(num_rows):
                    if given_up is not None and given_up.is_set():
                        return False
                    features_TD = np.ascontiguousarray(compute(row))
                    lengths[row] = len(features_TD)
                    digest.update(features_TD.data)
                    with _not_written():
                        file.write(features_TD.data)
                digest.update(lengths.data)
                with _not_written():
                    file.write(lengths.data)
                    file.close()
            finally:
                with contextlib.suppress(OSError):
                    file.close()
            # Another run may have been faster: what a third one has mapped is not replaced.
            if self._found(key) is None:
                with _not_written():
                    temporary.replace(self.folder / f"{key}-{digest.hexdigest()}")
        except InputError:
            # Perhaps of a row, or at a speed, that the run never asks for.
            return False
        except _NotWrittenError as error:
            self._writable = False
            click.echo(f"warning: features cannot be kept for other runs: {error}", err=True)
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return True


class _NotWrittenError(Exception):
    """Of the file, as against what reading audio raises."""


@contextlib.contextmanager
def _not_written() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _NotWrittenError(str(error)) from error


def _key(corpus: Corpus, front_end: Fbank, speed: float) -> str:
    audio = [list(row.values()) for row in corpus.table.select(_AUDIO).to_pylist()]
    made_from = [_VERSION, _library_versions(), front_end.model_dump(mode="json"), speed, audio]
    return sha256_hex(json.dumps(made_from).encode())[:32]


@functools.cache
def _library_versions() -> list[str]:
    return [importlib.metadata.version(name) for name in _LIBRARIES]
