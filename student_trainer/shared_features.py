"""Features in files that the runs of a sweep share: the first run to need them computes them, the others map them into memory.

::

    <folder>/KEY-DIGEST    float32 [N, D], the frames of all utterances of a corpus; then int64 [utterances], how many each has

KEY is of what they are made from: the front end, the speed and each utterance's audio, by its sha256 and its part of the
recording. DIGEST is of the file's own bytes; one that is damaged counts as not there. They are, bit for bit, what a run would
compute itself.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from softlabel_schemas.corpus import Corpus
from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.front_end import AnyFrontEnd, Fbank, Float32
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.targets import offsets_of

# What the samples of an utterance are.
_AUDIO = ("sha256", "start_sample", "num_samples", "sample_rate")


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
        self._store = ObjectStore(folder)

    def of(
        self,
        corpus: Corpus,
        front_end: AnyFrontEnd,
        speed: float,
        compute: Callable[[int], Float32],
        given_up: threading.Event | None = None,
    ) -> CorpusFeatures | None:
        """Features of all rows. None where they are not kept, and are the caller's to compute: of a corpus that is too large,
        or does not say what its audio files hold; of stored features and waveforms; or once ``given_up`` is set.

        Args:
            compute: features of a row; raises what reading audio raises.
        """
        if not isinstance(front_end, Fbank) or corpus.table["sha256"].null_count:
            return None
        if corpus.seconds().sum() > self.max_seconds:
            return None
        shape = len(corpus), front_end.num_features
        key = _key(corpus, front_end, speed)
        found = self._found(key)
        if found is not None:
            return CorpusFeatures(found, *shape)
        rows: list[npt.NDArray[Any]] = []
        for row in range(len(corpus)):
            if given_up is not None and given_up.is_set():
                return None
            rows.append(np.ascontiguousarray(compute(row)))
        lengths = np.array([len(features_TD) for features_TD in rows], np.int64)
        data = b"".join(array.data.cast("B") for array in (*rows, lengths))
        rows.clear()
        try:
            self._store.put(f"{key}-{sha256_hex(data)}", data)
        except OSError as error:
            click.echo(f"warning: features cannot be kept for other runs: {error}", err=True)
            return CorpusFeatures(np.frombuffer(data, np.uint8), *shape)
        found = self._found(key)
        return CorpusFeatures(np.frombuffer(data, np.uint8) if found is None else found, *shape)

    def _found(self, key: str) -> npt.NDArray[np.uint8] | None:
        # Temporary files of other runs have longer names.
        for path in self.folder.glob(f"{key}-{'?' * 64}"):
            # What was cut to nothing cannot be mapped.
            if path.stat().st_size:
                data = np.memmap(path, dtype=np.uint8, mode="r")
                if path.name == f"{key}-{hashlib.sha256(data.data).hexdigest()}":
                    return data
        return None


def _key(corpus: Corpus, front_end: Fbank, speed: float) -> str:
    audio = [list(row.values()) for row in corpus.table.select(_AUDIO).to_pylist()]
    made_from = [front_end.model_dump(mode="json"), speed, audio]
    return sha256_hex(json.dumps(made_from).encode())[:32]
