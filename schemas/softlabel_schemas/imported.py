"""Corpora in the forms that others write, read as rows, and the corpus manifest that the rows become.

::

    kaldi_data, lhotse_cuts, table_corpus, tar_corpus -> ImportedRow -> audio headers, digests -> Utterance -> write_corpus

Audio stays where it is: the manifest names its place, and which part of a recording or of a tar archive an utterance is.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from softlabel_schemas.command_line import progress
from softlabel_schemas.connection import refuse_malformed
from softlabel_schemas.corpus import Utterance, split_url
from softlabel_schemas.corpus_output import location_below
from softlabel_schemas.errors import InputError
from softlabel_schemas.frame_labels import AlignedItem, NumFramesError, frames_of_items, middle_of_stack, on_frames
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.object_store import ObjectStore, refuse_credentials
from softlabel_schemas.problems import Problems
from softlabel_schemas.read_ahead import read_ahead
from softlabel_schemas.utterance_reader import BAD_NAMES, SERIAL_SUBTYPES

# Kaldi's extract-segments cuts off what a segment has beyond the recording up to so much, and refuses more.
_MAX_OVERSHOOT_SECONDS = 0.5
_FILES_AT_ONCE = 8
# Without an inventory each class up to the highest gets a name: one stray id of 2,000,000,000 would take the memory of as many.
_MAX_UNNAMED_ID = 1 << 20
_SILENCES = ("SIL", "sil", "sp", "spn", "SPN", "+NSN+", "+SPN+")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportedRow:
    """An utterance as another form has it.

    Attributes:
        audio: URL or path of the audio file.
        audio_part: offset and length of the audio file in the bytes there, as in a tar archive.
        start, duration: in the recording, seconds; ``duration`` None: up to its end.
        end: instead of a duration, of a segment of Kaldi's: seconds, below 0 the recording's end.
        class_ids: hard label of each frame of the alignment, int32 [frames].
        items: hard labels as stretches of time from the start of the utterance.
    """

    utterance_id: str
    audio: str
    audio_part: tuple[int, int] | None = None
    start: float = 0.0
    duration: float | None = None
    end: float | None = None
    text: str | None = None
    speaker: str | None = None
    split: str | None = None
    class_ids: npt.NDArray[np.int32] | None = None
    items: tuple[AlignedItem, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """Of hard labels: alignments have one each ``frame_shift_ms``, the manifest gets the middle one of ``stack``."""

    frame_shift_ms: float
    stack: int


@dataclass(frozen=True, slots=True)
class AudioFile:
    """``sha256``: empty where only the header was read."""

    sample_rate: int
    num_samples: int
    num_channels: int
    subtype: str
    sha256: str = ""


def read_source(url: str) -> bytes:
    """A file on a disk or an object store. Raises InputError where it is missing."""
    folder, name = split_url(url)
    try:
        return ObjectStore(folder).read(name)
    except FileNotFoundError:
        raise InputError(f"{url} does not exist") from None


def read_text(url: str) -> str:
    """Raises InputError where the file is missing or not UTF-8."""
    return text_of(read_source(url), url)


def text_of(data: bytes, url: str) -> str:
    """Raises InputError where the bytes of the file are not UTF-8."""
    try:
        # Windows' programs begin it with a byte order mark.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{url} is not UTF-8 text: {error}") from None


def array_of_npy(data: bytes) -> npt.NDArray[Any]:
    """The array of a ``.npy`` file. Raises ValueError."""
    try:
        # np.load would also take zip archives.
        return np.asarray(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))
    except Exception as error:  # noqa: BLE001 - of a damaged header NumPy's parser may raise anything
        raise ValueError(f"not a .npy array: {type(error).__name__} {error}") from None


def utterances_of(
    rows: Sequence[ImportedRow], frames: Frames, inventory: ClassInventory | None, *, output: str, where: str
) -> tuple[list[Utterance], ClassInventory | None]:
    """The rows of a corpus manifest at ``output``, and the inventory of their hard labels: the one given, or one of the names
    that occur.

    Raises:
        InputError: rows that cannot be used; all of them, by what is wrong, with their number and the first names.
    """
    problems = Problems()
    for utterance_id, count in Counter(row.utterance_id for row in rows).items():
        if count > 1:
            problems.add("utterance ids that occur more than once", utterance_id)
    for row in rows:
        if row.split is None:
            problems.add("utterances without a split (give it as SPLIT=SOURCE)", row.utterance_id)
        try:
            # Before any message has the location.
            refuse_credentials(row.audio)
            refuse_malformed(row.audio)
        except InputError as error:
            problems.add(f"audio where {error}", row.utterance_id)
    inventory = inventory or _inventory_of(rows, problems)
    problems.raise_if_any(f"{where} cannot be imported")
    id_of_name = {name: index for index, name in enumerate(inventory.names)} if inventory else {}
    files = _read_audio_files(rows, problems)
    utterances = []
    for row in rows:
        audio = files.get((row.audio, row.audio_part))
        made = audio and _utterance(row, audio, frames, id_of_name, output, problems)
        if made:
            utterances.append(made)
    problems.raise_if_any(f"{where} cannot be imported")
    return utterances, inventory


def _inventory_of(rows: Sequence[ImportedRow], problems: Problems) -> ClassInventory | None:
    """Of the names in the alignments, which are phones; of numbers, up to the highest. None without alignments, or with ids
    that are too high, which are problems.
    """
    names = sorted({item.name for row in rows for item in row.items or ()})
    if names:
        silences = tuple(name for name in names if name in _SILENCES)
        return ClassInventory(names=tuple(names), phones=tuple(names), silence_phones=silences)
    highest = -1
    for row in rows:
        found = -1 if row.class_ids is None else int(row.class_ids.max(initial=-1))
        if found > _MAX_UNNAMED_ID:
            problems.add(f"alignments with class ids above {_MAX_UNNAMED_ID}, which need --inventory", row.utterance_id)
        else:
            highest = max(highest, found)
    return ClassInventory(names=tuple(str(index) for index in range(highest + 1))) if highest >= 0 else None


def _read_audio_files(
    rows: Sequence[ImportedRow], problems: Problems
) -> dict[tuple[str, tuple[int, int] | None], AudioFile]:
    """Header and digest of each audio file, in the order of the rows; those that cannot be read are problems."""
    wanted = list(dict.fromkeys((row.audio, row.audio_part) for row in rows))
    stores = {folder: ObjectStore(folder) for folder in {split_url(audio)[0] for audio, _ in wanted}}
    files = {}

    def read(item: tuple[str, tuple[int, int] | None]) -> AudioFile | str:
        (folder, name), part = split_url(item[0]), item[1]
        if "\0" in item[0]:
            return "audio files that do not exist"
        try:
            data = stores[folder].read_range(name, part[0], sum(part)) if part else stores[folder].read(name)
        except FileNotFoundError:
            return "audio files that do not exist"
        except OSError as error:
            if error.errno not in BAD_NAMES:
                raise
            return "audio files whose names are too long, or that are links in a circle"
        return audio_file(data)

    with progress("import", len(wanted), "audio files") as advance:
        for done, coming in enumerate(read_ahead(read, wanted, num_parallel=_FILES_AT_ONCE), start=1):
            found = coming.result()
            if isinstance(found, str):
                problems.add(found, wanted[done - 1][0])
            else:
                files[wanted[done - 1]] = found
            advance(done)
    return files


def audio_file(data: bytes) -> AudioFile | str:
    """What the bytes of one say of it, or what is wrong with it."""
    found = audio_header(io.BytesIO(data))
    return found if isinstance(found, str) else replace(found, sha256=hashlib.sha256(data).hexdigest())


def audio_header(file: IO[bytes]) -> AudioFile | str:
    """:func:`audio_file`, without the digest, and so without reading all of it."""
    import soundfile

    try:
        with soundfile.SoundFile(file) as audio:
            found = AudioFile(audio.samplerate, audio.frames, audio.channels, audio.subtype)
    except soundfile.SoundFileError as error:
        return f"audio files that are not readable ({getattr(error, 'error_string', error)})"
    return found if found.num_channels == 1 else f"audio files with {found.num_channels} channels, expected 1"


def _utterance(
    row: ImportedRow,
    audio: AudioFile,
    frames: Frames,
    id_of_name: dict[str, int],
    output: str,
    problems: Problems,
) -> Utterance | None:
    times = (row.start, row.duration or 0.0, row.end or 0.0)
    if not all(math.isfinite(seconds * audio.sample_rate) for seconds in times):
        problems.add("segments whose times are no finite numbers of samples", row.utterance_id)
        return None
    start, end = _samples_of(row, audio)
    num_samples = min(end, audio.num_samples) - start
    if start < 0 or num_samples <= 0 or end - audio.num_samples > _MAX_OVERSHOOT_SECONDS * audio.sample_rate:
        problems.add("segments outside their recordings, or empty", row.utterance_id)
        return None
    is_whole = start == 0 and num_samples == audio.num_samples
    if not is_whole and audio.subtype.startswith(SERIAL_SUBTYPES):
        problems.add(
            "segments of MP3 or Opus recordings, which cannot be read from the middle (make FLAC)", row.utterance_id
        )
        return None
    front_end = Fbank(sample_rate=audio.sample_rate, frame_shift_ms=frames.frame_shift_ms)
    labels_T = None
    try:
        if row.class_ids is not None:
            labels_T = on_frames(row.class_ids, num_samples, front_end)
        elif row.items is not None:
            labels_T = frames_of_items(row.items, id_of_name, front_end.num_frames(num_samples), frames.frame_shift_ms)
    except NumFramesError as error:
        shift = f"{frames.frame_shift_ms:g} ms"
        problems.add(f"alignments that do not fit the audio at {shift} a frame", f"{row.utterance_id}: {error}")
        return None
    except KeyError as error:
        problems.add(f"alignments with {error.args[0]}, which the inventory lacks", row.utterance_id)
        return None
    if labels_T is not None and not -1 <= labels_T.min(initial=-1) <= labels_T.max(initial=-1) < len(id_of_name):
        problems.add(f"alignments with class ids that are not -1 to {len(id_of_name) - 1}", row.utterance_id)
        return None
    assert row.split is not None
    return Utterance(
        utterance_id=row.utterance_id,
        audio=location_below(row.audio, output),
        sha256=audio.sha256,
        sample_rate=audio.sample_rate,
        num_samples=num_samples,
        text=row.text,
        speaker=row.speaker,
        split=row.split,
        hard_labels=None if labels_T is None else middle_of_stack(labels_T, frames.stack),
        start_sample=None if is_whole else start,
        audio_offset=row.audio_part and row.audio_part[0],
        audio_bytes=row.audio_part and row.audio_part[1],
    )


def _samples_of(row: ImportedRow, audio: AudioFile) -> tuple[int, int]:
    """The first sample, and the one after the last, which may be beyond the recording."""
    rate, num_samples = audio.sample_rate, audio.num_samples
    if row.end is not None:
        # As extract-segments does, in double: both ends are cut off. A rounded length is a sample off in 1.2% of segments with
        # milliseconds, which can be the one that the alignment lacks a frame for.
        return int(row.start * rate), num_samples if row.end < 0 else int(row.end * rate)
    start = round(row.start * rate)
    return start, num_samples if row.duration is None else start + round(row.duration * rate)
