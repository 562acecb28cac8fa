"""WebDataset shards: tar archives whose members with a common name, up to the first dot, are one utterance.

::

    a/0001.flac  a/0001.txt  a/0001.json  a/0001.alignment.npy      -> utterance "a/0001"

Audio is a member with an extension of ``AUDIO``; ``.txt`` is the text; ``.json`` may have ``text`` and ``speaker``;
``.alignment.npy`` the class id of each frame. Others are passed over. The audio is read where it lies, as a range of the
archive's bytes, so archives must not be compressed. https://github.com/webdataset/webdataset
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field
from typing import IO, Any

from softlabel_schemas.corpus import split_url
from softlabel_schemas.corpus_blocks import RangeFile
from softlabel_schemas.digest import parse_json
from softlabel_schemas.errors import InputError
from softlabel_schemas.frame_labels import class_ids_of
from softlabel_schemas.imported import ImportedRow, array_of_npy
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.problems import Problems

AUDIO = ("flac", "wav", "ogg", "mp3", "opus")
_TEXT = ("txt", "json", "alignment.npy")
# Headers of small members come with what was read for the one before.
_BUFFER_BYTES = 1 << 20


@dataclass(slots=True)
class _Sample:
    audio: list[tuple[int, int]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def read_tar(url: str) -> list[ImportedRow]:
    """The utterances of one archive, in order.

    Raises:
        InputError: missing, compressed or no tar archive, or utterances without audio or with unreadable members; all of them.
    """
    folder, name = split_url(url)
    problems, samples = Problems(), dict[str, _Sample]()
    try:
        file = io.BufferedReader(RangeFile(ObjectStore(folder), name), _BUFFER_BYTES)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    _add(samples, archive, member, problems)
            _check_end(url, file, archive.offset)
    except FileNotFoundError:
        raise InputError(f"{url} does not exist") from None
    except tarfile.TarError as error:
        raise InputError(f"{url} is not an uncompressed tar archive: {error}") from None
    for utterance_id, sample in samples.items():
        if len(sample.audio) != 1:
            kind = "utterances without audio" if not sample.audio else "utterances with several audio files"
            problems.add(f"{kind} (of {', '.join(AUDIO)})", utterance_id)
    problems.raise_if_any(f"{url} cannot be imported")
    return [
        ImportedRow(utterance_id=each, audio=url, audio_part=sample.audio[0], **sample.values)
        for each, sample in samples.items()
    ]


def _check_end(url: str, file: IO[bytes], end: int) -> None:
    """Raises InputError unless zeros and nothing else are behind ``end``, where no further member was found: tarfile takes a
    damaged header for the end, and does not look for what comes after one."""
    file.seek(end)
    block, is_marked = file.read(_BUFFER_BYTES), False
    while block:
        if block.strip(b"\0"):
            raise InputError(
                f"{url} is not one whole tar archive: at byte {end} a member is damaged, or another archive follows"
            )
        block, is_marked = file.read(_BUFFER_BYTES), True
    if not is_marked:
        raise InputError(f"{url} is not a whole tar archive: it is cut off at byte {end}, before the zeros of its end")


def _add(samples: dict[str, _Sample], archive: tarfile.TarFile, member: tarfile.TarInfo, problems: Problems) -> None:
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    extension = extension.lower()
    if not stem or extension not in (*AUDIO, *_TEXT):
        return
    try:
        member.name.encode()
    except UnicodeEncodeError:
        problems.add("members whose names are not UTF-8", member.name)
        return
    sample = samples.setdefault(f"{folder}{slash}{stem}", _Sample())
    if extension in AUDIO:
        sample.audio.append((member.offset_data, member.size))
        return
    content = archive.extractfile(member)
    assert content is not None, "a regular file"
    try:
        sample.values.update(_values(extension, content.read()))
    except ValueError:
        problems.add(f"members .{extension} that are not readable", member.name)


def _values(extension: str, data: bytes) -> dict[str, Any]:
    """Fields of a row. Raises ValueError."""
    if extension == "txt":
        return {"text": data.decode().strip()}
    if extension == "json":
        found = parse_json(data)
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return {name: str(found[name]) for name in ("text", "speaker") if found.get(name) is not None}
    return {"class_ids": class_ids_of(array_of_npy(data))}
