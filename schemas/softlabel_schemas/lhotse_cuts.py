"""Lhotse cut manifests (JSON lines), read and written without lhotse.

Lhotse itself is not needed, and not wanted for files of others: it runs what a recording's source names as a command, and
unpickles arrays stored as "memory_raw". https://lhotse.readthedocs.io/en/latest/cuts.html
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabel_schemas.corpus import Corpus, Utterance, split_url
from softlabel_schemas.corpus_blocks import RangeFile
from softlabel_schemas.digest import parse_json
from softlabel_schemas.errors import InputError
from softlabel_schemas.frame_labels import AlignedItem, class_ids_of
from softlabel_schemas.imported import ImportedRow, array_of_npy, audio_header, read_source
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.problems import Problems
from softlabel_schemas.shard import LabelledUtterance
from softlabel_schemas.strict import printable
from softlabel_schemas.targets import SoftTargets

# Of labels, beyond what the duration has room for: a frame is begun, and edges may be padded.
_MAX_EXTRA_FRAMES = 2
# Of a recording at a time, to find its length.
_HEADER_BYTES = 1 << 16
# Plain files and URLs; the others are commands, or bytes within the manifest.
_SOURCES = ("file", "url")


class _BadCutError(ValueError):
    """What is wrong with a cut; the name of a kind of problem."""


def read_cuts(url: str, alignment: str | None, frame_shift_ms: float) -> list[ImportedRow]:
    """The cuts of a ``.jsonl`` or ``.jsonl.gz`` manifest, one utterance each.

    Args:
        alignment: where hard labels are: a custom field of the cuts (a list, or a temporal array stored as ``numpy_files``,
            with the class id of each frame), or a kind of supervisions' alignments (symbols with times).
        frame_shift_ms: of class ids.

    Raises:
        InputError: not a cut manifest, or cuts that cannot be utterances; all of them, by what is wrong.
    """
    problems, rows = Problems(), []
    for number, line in enumerate(_lines(url), start=1):
        try:
            cut = parse_json(line.encode())
            name = str(cut["id"])
        except (ValueError, KeyError, TypeError):
            # The line is not shown: it may have a URL with a credential.
            raise InputError(
                f'{url}, line {number}: not a cut of a Lhotse manifest, a JSON object with an "id"'
            ) from None
        try:
            rows.append(_row(cut, alignment, frame_shift_ms))
        except _BadCutError as error:
            problems.add(str(error), name)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            problems.add("cuts that are malformed", f"{name}: {type(error).__name__} {printable(str(error))}")
    if alignment is not None and rows and all(row.class_ids is None and row.items is None for row in rows):
        raise InputError(f"{url}: no cut has the custom field or the alignment '{alignment}'")
    problems.raise_if_any(f"{url} cannot be imported")
    return rows


def _lines(url: str) -> Iterator[str]:
    data = read_source(url)
    try:
        text = (gzip.decompress(data) if url.endswith(".gz") else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{url} is not a Lhotse manifest of JSON lines: {error}") from None
    # Other ends of lines that str.splitlines() knows, such as U+2028, may stand in JSON strings.
    return (line for line in text.split("\n") if line.strip())


def _row(cut: dict[str, Any], alignment: str | None, frame_shift_ms: float) -> ImportedRow:
    if "type" not in cut:
        raise _BadCutError("recordings or supervisions, expected cuts ('lhotse cut simple' makes them of both)")
    if cut["type"] != "MonoCut":
        raise _BadCutError(f"cuts of type {printable(cut['type'])}, expected MonoCut (one recording, one channel)")
    sources = cut["recording"]["sources"]
    if len(sources) != 1 or sources[0]["type"] not in _SOURCES:
        raise _BadCutError(
            "cuts whose audio is not a file or a URL (commands are not run; cuts.save_audios makes files)"
        )
    if not isinstance(sources[0]["source"], str):
        raise _BadCutError("cuts whose source of the audio is not text, expected a path or a URL")
    if cut["recording"].get("transforms"):
        raise _BadCutError(
            "cuts with transforms of the audio, such as another speed or rate (cuts.save_audios makes files)"
        )
    supervisions = sorted(cut.get("supervisions") or (), key=lambda each: float(each["start"]))
    texts = [each["text"] for each in supervisions if each.get("text") is not None]
    # LibriSpeech's are numbers.
    speakers = {None if each.get("speaker") is None else str(each["speaker"]) for each in supervisions}
    class_ids, items = (None, None) if alignment is None else _hard_labels(cut, supervisions, alignment, frame_shift_ms)
    return ImportedRow(
        utterance_id=str(cut["id"]),
        audio=sources[0]["source"],
        start=float(cut["start"]),
        duration=float(cut["duration"]),
        text=" ".join(texts) if texts else None,
        speaker=speakers.pop() if len(speakers) == 1 else None,
        class_ids=class_ids,
        items=items,
    )


def _hard_labels(
    cut: dict[str, Any], supervisions: list[dict[str, Any]], name: str, frame_shift_ms: float
) -> tuple[npt.NDArray[np.int32] | None, tuple[AlignedItem, ...] | None]:
    found = (cut.get("custom") or {}).get(name)
    if found is not None:
        values = found if isinstance(found, list) else _load_array(found, cut, frame_shift_ms)
        try:
            return class_ids_of(values), None
        except ValueError:
            raise _BadCutError(f"cuts whose '{name}' is not a row of class ids") from None
    of_supervisions = [each["alignment"][name] for each in supervisions if name in (each.get("alignment") or {})]
    if not of_supervisions:
        return None, None
    # Supervisions begin relative to their cut, but their alignments relative to the recording.
    start = float(cut["start"])
    items = [
        (symbol, float(begin) - start, float(length)) for part in of_supervisions for symbol, begin, length, *_ in part
    ]
    if not all(math.isfinite(begin) and math.isfinite(length) for _, begin, length in items):
        raise _BadCutError(f"cuts whose '{name}' has times that are not finite")
    return None, tuple(AlignedItem(str(symbol), begin, begin + length) for symbol, begin, length in items)


def _load_array(manifest: dict[str, Any], cut: dict[str, Any], frame_shift_ms: float) -> npt.NDArray[Any]:
    """The part of a TemporalArray that belongs to the cut."""
    array = manifest["array"]
    if array["storage_type"] != "numpy_files":
        raise _BadCutError(
            f"arrays stored as {printable(array['storage_type'])}, expected numpy_files (NumpyFilesWriter)"
        )
    if abs(manifest["frame_shift"] * 1000 - frame_shift_ms) > 1e-6:
        raise _BadCutError(
            f"arrays with frames of {manifest['frame_shift'] * 1000:g} ms, expected {frame_shift_ms:g} (--frame-shift-ms)"
        )
    data = read_source(f"{array['storage_path']}/{array['storage_key']}")
    values = array_of_npy(data)
    if not values.ndim:
        raise _BadCutError("arrays of a single value, expected one for each frame")
    first = round((cut["start"] - manifest["start"]) / manifest["frame_shift"])
    if first < 0:
        raise _BadCutError("cuts that begin before their array")
    return np.asarray(values[first : first + round(cut["duration"] / manifest["frame_shift"] + 1e-6)])


def write_cuts(
    utterances: Iterable[LabelledUtterance], corpus: Corpus, frame_shift_ms: float, folder: Path, final_folder: Path
) -> int:
    """``cuts.jsonl.gz``, and for each utterance three temporal arrays in ``arrays/``, whose paths hold in ``final_folder``.

    With M the largest number of entries of a frame of the utterance and K temperatures: ``soft_label_ids`` int32 [T, M], padded
    with -1; ``soft_label_log_probs`` float32 [T, M], raw, padded with -inf; ``soft_label_tail_mass`` float32 [T, K].

    Returns the number of utterances whose last frame a cut leaves out: Lhotse loads those that its duration has, rounded.

    Raises:
        InputError: an utterance is not in the corpus or has another length there, or its audio is a part of an archive, which
            Lhotse cannot read; or the recording that it is a segment of cannot be read.
    """
    num_shortened, recordings = 0, dict[str, int]()
    rows = {utterance_id: row for row, utterance_id in enumerate(corpus.table["utterance_id"].to_pylist())}
    with gzip.open(folder / "cuts.jsonl.gz", "wt", encoding="utf-8") as file:
        for number, labelled in enumerate(utterances):
            if labelled.utterance_id not in rows:
                raise InputError(f"utterance {printable(labelled.utterance_id)} is not in the corpus manifest given")
            utterance = corpus[rows[labelled.utterance_id]]
            num_frames = labelled.targets.num_frames
            frames_of_cut = utterance.seconds * 1000 / frame_shift_ms
            if abs(frames_of_cut - num_frames) > _MAX_EXTRA_FRAMES:
                raise InputError(
                    f"utterance {printable(labelled.utterance_id)} lasts {utterance.seconds:g} s in the corpus manifest given, "
                    f"but has {num_frames} frames of {frame_shift_ms:g} ms; give that of the corpus that was labelled"
                )
            num_shortened += num_frames > math.floor(frames_of_cut + 0.5)
            arrays = _arrays(labelled.targets)
            # Numbers, as ids may hold what names of files cannot.
            key = f"{number // 1000:06d}/{number:09d}"
            (folder / "arrays" / key).parent.mkdir(parents=True, exist_ok=True)
            cut = _cut(utterance, corpus, recordings)
            for name, values in arrays.items():
                np.save(folder / "arrays" / f"{key}-{name}.npy", values)
                cut["custom"][f"soft_label_{name}"] = {
                    "array": {
                        "storage_type": "numpy_files",
                        "storage_path": str(final_folder.absolute() / "arrays"),
                        "storage_key": f"{key}-{name}.npy",
                        "shape": list(values.shape),
                    },
                    "temporal_dim": 0,
                    "frame_shift": frame_shift_ms / 1000,
                    "start": cut["start"],
                }
            file.write(json.dumps(cut, ensure_ascii=False) + "\n")
    return num_shortened


def _arrays(targets: SoftTargets) -> dict[str, npt.NDArray[Any]]:
    ids_TM, log_probs_TM = targets.padded()
    return {
        "ids": np.where(np.isfinite(log_probs_TM), ids_TM, -1).astype(np.int32),
        "log_probs": log_probs_TM,
        "tail_mass": targets.tail_mass,
    }


def _samples_of(location: str) -> int:
    """From the header alone: recordings with segments are long."""
    folder, name = split_url(location)
    try:
        file = RangeFile(ObjectStore(folder), name)
        # Here, as what is raised while soundfile reads is printed.
        file.fetch(0, _HEADER_BYTES)
    except FileNotFoundError:
        raise InputError(f"{location} does not exist") from None
    found = audio_header(io.BufferedReader(file, _HEADER_BYTES))
    if file.error is not None:
        # For soundfile the file then ends there.
        raise file.error
    if isinstance(found, str):
        raise InputError(f"{location}: {found}")
    return found.num_samples


def _cut(utterance: Utterance, corpus: Corpus, recordings: dict[str, int]) -> dict[str, Any]:
    """``recordings``: samples of those that have segments, as far as they are known."""
    if utterance.audio is None or utterance.audio_bytes is not None:
        raise InputError(
            f"utterance {printable(utterance.utterance_id)} has no audio file of its own, which a Lhotse recording needs"
        )
    location = corpus.location(utterance.audio)
    rate, start = utterance.sample_rate, utterance.start_sample or 0
    num_samples = utterance.num_samples
    if utterance.start_sample is not None:
        # Lhotse checks it against the file where a cut takes the whole of what is declared.
        if location not in recordings:
            recordings[location] = _samples_of(location)
        num_samples = recordings[location]
    supervision = {
        "id": utterance.utterance_id,
        "recording_id": utterance.utterance_id,
        "start": 0.0,
        "duration": utterance.num_samples / rate,
        "channel": 0,
        "text": utterance.text,
        "speaker": utterance.speaker,
    }
    return {
        "id": utterance.utterance_id,
        "start": start / rate,
        "duration": utterance.num_samples / rate,
        "channel": 0,
        "supervisions": [{name: value for name, value in supervision.items() if value is not None}],
        "recording": {
            "id": utterance.utterance_id,
            "sources": [{"type": "url" if "://" in location else "file", "channels": [0], "source": location}],
            "sampling_rate": rate,
            "num_samples": num_samples,
            "duration": num_samples / rate,
            "channel_ids": [0],
        },
        "custom": {},
        "type": "MonoCut",
    }
