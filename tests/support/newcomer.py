"""What a newcomer brings to the README's tasks: a corpus as a table, as Kaldi data directories and as Lhotse cuts, and a
Hugging Face CTC model. It is noise, and the model's weights are random."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import lhotse
import numpy as np
import soundfile

from tests.support.hugging_face import save_folder, tiny_model

_RATE = 16_000
_SIZES = {"train": 8, "dev": 2, "test": 4}
# Spelled in the tokens of the tiny model.
_TEXTS = ("AB C", "B", "C AC", "BA")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    utterance_id: str
    audio: str
    text: str
    speaker: str
    split: str


def write_corpus_and_model(folder: Path, columns: list[str]) -> None:
    """``utterances.tsv`` with these columns, ``data/SPLIT``, ``SPLIT.jsonl.gz``, ``wav2vec2-base-960h``."""
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir()
    rows = []
    for split, size in _SIZES.items():
        for index in range(size):
            row = _Row(
                utterance_id=f"{split}-{index}",
                audio=f"audio/{split}-{index}.wav",
                text=_TEXTS[index % len(_TEXTS)],
                speaker=f"speaker-of-{split}",
                split=split,
            )
            samples = 0.1 * rng.standard_normal(12_000 + 1_711 * index)
            soundfile.write(folder / row.audio, samples, _RATE, subtype="PCM_16")
            rows.append(row)
    lines = [columns, *([getattr(row, column) for column in columns] for row in rows)]
    (folder / "utterances.tsv").write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    for split in _SIZES:
        chosen = [row for row in rows if row.split == split]
        _write_kaldi(folder / "data" / split, chosen)
        cuts = [_cut(folder, row) for row in chosen]
        lhotse.CutSet.from_cuts(cuts).to_file(folder / f"{split}.jsonl.gz")
    save_folder(folder / "wav2vec2-base-960h", tiny_model("wav2vec2", "group"))


def _write_kaldi(folder: Path, rows: list[_Row]) -> None:
    folder.mkdir(parents=True)
    for name, column in (("wav.scp", "audio"), ("text", "text"), ("utt2spk", "speaker")):
        lines = [f"{row.utterance_id} {getattr(row, column)}\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")


def _cut(folder: Path, row: _Row) -> lhotse.MonoCut:
    recording = lhotse.Recording.from_file(folder / row.audio, recording_id=row.utterance_id)
    cut = recording.to_cut()
    cut.id = row.utterance_id
    cut.supervisions = [
        lhotse.SupervisionSegment(
            id=row.utterance_id,
            recording_id=row.utterance_id,
            start=0.0,
            duration=recording.duration,
            text=row.text,
            speaker=row.speaker,
        )
    ]
    return cut
