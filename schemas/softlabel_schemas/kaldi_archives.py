"""Kaldi archives, by kaldi-native-io: alignments in, posteriors out.

Kaldi's own readers run what a script file names as a command ("gunzip -c ali.1.gz |"), a range of frames behind it or not
("gunzip -c ali.1.gz |[0:3]"), and read standard input for "-". Here script files may name files and offsets into files only,
and archives compressed with gzip, as Kaldi's alignments are, are unpacked by Python.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from softlabel_schemas.errors import InputError
from softlabel_schemas.local_files import TEMPORARY
from softlabel_schemas.shard import LabelledUtterance
from softlabel_schemas.strict import shortened
from softlabel_schemas.targets import SoftTargets

Int32 = npt.NDArray[np.int32]

# A line's key ends at white space, and Kaldi takes none with control characters.
_NOT_IN_KEYS = re.compile(r"[\s\x00-\x1f\x7f]")


def read_alignments(paths: Sequence[str]) -> dict[str, Int32]:
    """The class id of each frame, int32 [frames], by utterance.

    Args:
        paths: archives, binary or text, perhaps compressed (``.gz``); ``.scp`` script files.

    Raises:
        InputError: a file is missing or no archive of integer vectors, or an utterance occurs twice, or a script file has
            a command or standard input.
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
            except UnicodeDecodeError as error:
                raise InputError(f"{path} has an utterance id that is not UTF-8: {error}; convert it first") from None
            if not is_whole:
                raise InputError(
                    f"{path} is not a whole archive of integer vectors, or names files that are not there; make one of "
                    "alignments with ali-to-pdf or ali-to-phones --per-frame"
                )
    return found


@contextlib.contextmanager
def _rspecifier(path: str) -> Iterator[str]:
    """How Kaldi is to be told of the file. Raises InputError where it is missing, or names what is not a file."""
    if "|" in path or not Path(path).is_file():
        raise InputError(f"alignments {path} do not exist; give the path of an .ark, .scp or .gz file (no commands)")
    if path.endswith(".scp"):
        _check_script(path)
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


def _check_script(path: str) -> None:
    """Raises InputError where a line has a command or standard input: anything but FILE or FILE:OFFSET."""
    # As bytes, which end a line at "\n" only and a key at white space of ASCII only, as Kaldi does: what looks like two lines
    # to Python may be one command to Kaldi.
    with Path(path).open("rb") as script:
        for line in script:
            location = b"".join(line.split(maxsplit=1)[1:]).rstrip()
            # Wherever it stands: Kaldi takes a range off the end before it looks for the bar of a command.
            if b"|" in location:
                raise InputError(f"{path} has a command, which is not run: {_shown(line)}; copy the alignments first")
            if location.partition(b"[")[0] == b"-":
                raise InputError(
                    f"{path} has standard input, expected FILE or FILE:OFFSET: {_shown(line)}; copy the alignments first"
                )


def _shown(line: bytes) -> str:
    return shortened(line.decode(errors="replace").strip())


def write_posteriors(utterances: Iterable[LabelledUtterance], folder: Path, final_folder: Path) -> None:
    """``post.ark`` and ``post.scp`` in ``folder``, the latter with the paths that hold in ``final_folder``.

    A frame has a (class id, probability) pair for each kept class, the probabilities **renormalised** to add up to 1: Kaldi's
    training knows no tail, and takes what is missing from 1 as a lower weight of the frame. A frame without entries has no
    pairs, and so no weight.

    Raises:
        InputError: an utterance id has white space or control characters, or the folder a comma or a bar.
        OSError: not everything could be written.
    """
    # The wrapper around this class hides whether an archive was written to its end.
    from kaldi_native_io.lib._kaldi_native_io import _PosteriorWriter

    if "," in str(folder) or "|" in str(folder):
        raise InputError(
            f"{final_folder} has a comma, at which Kaldi parts the names of two files, or a bar, which makes it a command; "
            "give another folder"
        )
    archive, script = folder / "post.ark", folder / "post.scp"
    writer, num_written = _PosteriorWriter(), 0
    if not writer.open(f"ark,scp:{archive},{script}"):
        raise _not_whole(final_folder)
    try:
        for utterance in utterances:
            if _NOT_IN_KEYS.search(utterance.utterance_id):
                raise InputError(
                    f"utterance id {shortened(utterance.utterance_id)} has spaces or control characters, which Kaldi's "
                    "tables cannot hold"
                )
            pairs = _pairs(utterance.targets)
            try:
                writer.write(utterance.utterance_id, pairs)
            except RuntimeError:
                raise _not_whole(final_folder) from None
            num_written += 1
    finally:
        # Writes the last bytes. Where it is left to the destructor and they find no room, that ends the process.
        is_whole = writer.close()
    if not is_whole or _rename_archive(script, archive, final_folder.absolute() / archive.name) != num_written:
        raise _not_whole(final_folder)


def _not_whole(final_folder: Path) -> OSError:
    return OSError(
        f"{final_folder}: the posteriors could not all be written, as on a full disk; make room there and export again"
    )


def _rename_archive(script: Path, archive: Path, final_archive: Path) -> int:
    """The number of lines of ``script``, which then name ``final_archive`` where they named ``archive``."""
    renamed, num_lines = script.with_name(f"{script.name}{TEMPORARY}"), 0
    # A line at a time: there are as many as utterances. Kaldi's lines end at "\n" only.
    with (
        script.open(encoding="utf-8", newline="\n") as lines,
        renamed.open("w", encoding="utf-8", newline="\n") as written,
    ):
        for line in lines:
            written.write(line.replace(f" {archive}:", f" {final_archive}:"))
            num_lines += 1
    renamed.replace(script)
    return num_lines


def _pairs(targets: SoftTargets) -> list[list[tuple[int, float]]]:
    kept_mass_E = np.repeat(targets.kept_mass_T(), targets.counts_T)
    probs_E = np.exp(targets.log_probs.astype(np.float64)) / kept_mass_E
    pairs = list(zip(targets.class_ids.tolist(), probs_E.tolist(), strict=True))
    return [pairs[start:stop] for start, stop in pairwise(targets.offsets.tolist())]
