"""Kaldi archives, by kaldi-native-io: alignments in, posteriors out.

Kaldi's own readers run what a script file names as a command ("gunzip -c ali.1.gz |"). Here that is refused, and archives
compressed with gzip, as Kaldi's alignments are, are unpacked by Python.
"""

from __future__ import annotations

import contextlib
import gzip
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from softlabel_schemas.errors import InputError
from softlabel_schemas.shard import LabelledUtterance
from softlabel_schemas.strict import shortened
from softlabel_schemas.targets import SoftTargets

Int32 = npt.NDArray[np.int32]


def read_alignments(paths: Sequence[str]) -> dict[str, Int32]:
    """The class id of each frame, int32 [frames], by utterance.

    Args:
        paths: archives, binary or text, perhaps compressed (``.gz``); ``.scp`` script files.

    Raises:
        InputError: a file is missing or no archive of integer vectors, or an utterance occurs twice.
    """
    # The wrappers around these classes hide whether an archive was read to its end or is damaged.
    from kaldi_native_io.lib._kaldi_native_io import _SequentialInt32VectorReader

    found: dict[str, Int32] = {}
    for path in paths:
        with _rspecifier(path) as rspecifier:
            try:
                reader = _SequentialInt32VectorReader(rspecifier)
                while not reader.done:
                    if reader.key in found:
                        raise InputError(f"{path}: utterance {shortened(reader.key)} has an alignment already")
                    found[reader.key] = np.array(reader.value, dtype=np.int32)
                    reader.next()
                is_whole = reader.close()
            except RuntimeError:
                is_whole = False
            if not is_whole:
                raise InputError(
                    f"{path} is not a whole archive of integer vectors, or names files that are not there; make one of "
                    "alignments with ali-to-pdf or ali-to-phones --per-frame"
                )
    return found


@contextlib.contextmanager
def _rspecifier(path: str) -> Iterator[str]:
    """How Kaldi is to be told of the file. Raises InputError where it is missing, or would run a command."""
    if "|" in path or not Path(path).is_file():
        raise InputError(f"alignments {path} do not exist; give the path of an .ark, .scp or .gz file (no commands)")
    if path.endswith(".scp"):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if line.strip().endswith("|"):
                raise InputError(
                    f"{path} has a command, which is not run: {shortened(line)}; copy the alignments first"
                )
        yield f"scp:{path}"
    elif path.endswith(".gz"):
        with tempfile.NamedTemporaryFile(suffix=".ark") as unpacked:
            try:
                with gzip.open(path) as packed:
                    shutil.copyfileobj(packed, unpacked)
            except (OSError, EOFError) as error:
                raise InputError(f"{path} is not a whole gzip file: {error}") from None
            unpacked.flush()
            yield f"ark:{unpacked.name}"
    else:
        yield f"ark:{path}"


def write_posteriors(utterances: Iterable[LabelledUtterance], folder: Path, final_folder: Path) -> None:
    """``post.ark`` and ``post.scp`` in ``folder``, the latter with the paths that hold in ``final_folder``.

    A frame has a (class id, probability) pair for each kept class, the probabilities **renormalised** to add up to 1: Kaldi's
    training knows no tail, and takes what is missing from 1 as a lower weight of the frame. A frame without entries has no
    pairs, and so no weight.

    Raises:
        InputError: an utterance id has white space, or the folder a comma.
    """
    from kaldi_native_io import PosteriorWriter

    if "," in str(folder):
        raise InputError(
            f"{final_folder} has a comma, at which Kaldi parts the names of two files; give another folder"
        )
    archive, script = folder / "post.ark", folder / "post.scp"
    with PosteriorWriter(f"ark,scp:{archive},{script}") as writer:
        for utterance in utterances:
            # The key of a line ends at white space.
            if len(utterance.utterance_id.split()) != 1:
                raise InputError(
                    f"utterance id {shortened(utterance.utterance_id)} has spaces, which Kaldi's tables cannot hold"
                )
            writer.write(utterance.utterance_id, _pairs(utterance.targets))
    written = script.read_text(encoding="utf-8")
    script.write_text(written.replace(f" {archive}:", f" {final_folder.absolute() / archive.name}:"), encoding="utf-8")


def _pairs(targets: SoftTargets) -> list[list[tuple[int, float]]]:
    kept_mass_E = np.repeat(targets.kept_mass_T(), targets.counts_T)
    probs_E = np.exp(targets.log_probs.astype(np.float64)) / kept_mass_E
    pairs = list(zip(targets.class_ids.tolist(), probs_E.tolist(), strict=True))
    return [pairs[start:stop] for start, stop in pairwise(targets.offsets.tolist())]
