"""Kaldi data directories: wav.scp, segments, text and utt2spk.

Nothing of a data directory is executed: a recording that is a command ("sph2pipe ... |") must be made into a file first. Paths
are relative to the working folder, as they are for Kaldi's programs. https://kaldi-asr.org/doc/data_prep.html
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import click
import numpy as np
import numpy.typing as npt

from softlabel_schemas.errors import InputError
from softlabel_schemas.imported import ImportedRow, text_of
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.problems import Problems

Int32 = npt.NDArray[np.int32]
# "file.ark:1234", and "file.ark:1234[0:10]" of a part.
_IN_ARCHIVE = re.compile(r":\d+(\[.*\])?$")


def read_data_dir(folder: str, alignments: Mapping[str, Int32]) -> list[ImportedRow]:
    """The utterances of a data directory, in the order of ``segments``, or of ``wav.scp`` without it.

    Args:
        alignments: class id of each frame, by utterance; those of other utterances are passed over.

    Raises:
        InputError: a file is missing or malformed, or the files disagree about the utterances.
    """
    store, problems = ObjectStore(folder), Problems()
    recordings = _read_table(store, "wav.scp", problems)
    if recordings is None:
        raise InputError(f"{folder} has no wav.scp; give a Kaldi data directory (wav.scp, and segments, text, utt2spk)")
    for recording, location in recordings.items():
        if location.endswith("|") or location.startswith("|"):
            problems.add(
                "recordings that are commands, which are not run (make audio files of them and name these in wav.scp)",
                recording,
            )
        elif _IN_ARCHIVE.search(location):
            problems.add("recordings in Kaldi archives, which are not read (make audio files of them)", recording)
    segments = _read_table(store, "segments", problems)
    texts = _read_table(store, "text", problems) or {}
    speakers = _read_table(store, "utt2spk", problems) or {}
    rows = []
    for utterance_id in recordings if segments is None else segments:
        try:
            recording, start, end = (utterance_id, 0.0, None) if segments is None else _segment(segments[utterance_id])
        except ValueError:
            problems.add("lines of segments that are not UTTERANCE RECORDING START END", utterance_id)
            continue
        if recording not in recordings:
            problems.add("segments of recordings that wav.scp lacks", utterance_id)
            continue
        rows.append(
            ImportedRow(
                utterance_id=utterance_id,
                audio=recordings[recording],
                start=start,
                end=end,
                text=texts.get(utterance_id),
                speaker=speakers.get(utterance_id),
                class_ids=alignments.get(utterance_id),
            )
        )
    known = set(recordings if segments is None else segments)
    for name, table in (("text", texts), ("utt2spk", speakers)):
        for utterance_id in table:
            if utterance_id not in known:
                problems.add(f"utterances in {name} without audio (utils/fix_data_dir.sh removes them)", utterance_id)
    problems.raise_if_any(f"{folder} cannot be imported")
    return rows


def _read_table(store: ObjectStore, name: str, problems: Problems) -> dict[str, str] | None:
    """The rest of each line by its first word; None where there is no such file."""
    url = store.describe(name)
    try:
        data = store.read(name)
    except FileNotFoundError:
        if store.is_local and os.path.lexists(store.path(name)):
            raise InputError(
                f"{url} is no file, but a link to what does not exist, or a folder; mend or remove it"
            ) from None
        return None
    except PermissionError as error:
        if not url.startswith(("http://", "https://")):
            raise
        # So a bucket answers for what is not there, to who may not list it; wav.scp, beside it, could be read.
        click.echo(f"warning: taken for absent: {error}", err=True)
        return None
    found: dict[str, str] = {}
    # Other ends of lines that str.splitlines() knows, such as U+2028, may stand in transcripts.
    for number, line in enumerate(text_of(data, url).split("\n"), start=1):
        if not line.strip():
            continue
        key, *value = line.split(maxsplit=1)
        # A transcript may be empty.
        if not value and name != "text":
            # Not the line itself: of wav.scp it may be a URL with a credential.
            problems.add(f"lines of {name} that have no value", f"line {number}")
        elif key in found:
            problems.add(f"ids that occur more than once in {name}", key)
        else:
            found[key] = value[0].strip() if value else ""
    return found


def _segment(text: str) -> tuple[str, float, float]:
    """Recording, start and end in seconds; an end of -1 is that of the recording. Raises ValueError."""
    # A fourth value is the channel.
    recording, start, end, *_ = text.split()
    return recording, float(start), float(end)
