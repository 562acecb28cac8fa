"""The corpus of the experiment: speechocean762, with its senone alignments as hard labels.

Its folder holds ``utterances.tsv``, ``alignments.parquet`` (senone and phone of every 10 ms frame, by pocketsphinx' en-us
model) and ``flac/``; for words ``essence.py`` reads ``lexicon.txt`` beside them, of a word and its phones a line.

Targets are senones at a frame shift of 30 ms (the label of the middle one of three frames). Senones with fewer than
30 frames in the training speech are backed off to the most frequent senone of the same phone (``senones.py``). Speakers of
train, dev and test are disjoint; dev is carved from the training speakers; test is used for nothing but the final table.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import soundfile

from softlabel_schemas import InputError, Utterance, write_corpus
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.senones import back_off

NUM_DEV_SPEAKERS = 15
FRONT_END = Fbank(stack=3)
# Splits of the training speech, of equally many speakers each, for what learns from a share of it.
PARTS = ("train-1", "train-2", "train-3", "train-4")


def prepare(source: Path, output: Path, *, num_utterances: int | None = None) -> None:
    """Write ``inventory.json`` and, last, ``corpus.parquet``.

    Args:
        num_utterances: limits each split (for tests).
    """
    for name in ("utterances.tsv", "alignments.parquet", "flac"):
        if not (source / name).exists():
            raise InputError(f"{source / name} does not exist; give the folder of speechocean762 with its alignments")
    options = pa_csv.ConvertOptions(column_types={"utt": "string", "speaker": "string"})
    parse = pa_csv.ParseOptions(delimiter="\t")
    rows = pa_csv.read_csv(source / "utterances.tsv", parse_options=parse, convert_options=options).to_pylist()
    alignments = {row["utterance_id"]: row for row in pq.read_table(source / "alignments.parquet").to_pylist()}
    rows = [row for row in rows if row["utt"] in alignments]
    speakers = sorted({row["speaker"] for row in rows if row["split"] == "train"})
    shuffled = np.random.default_rng(762).permutation(speakers).tolist()
    split_of = dict.fromkeys(shuffled[:NUM_DEV_SPEAKERS], "dev")
    heard = shuffled[NUM_DEV_SPEAKERS:]
    split_of |= {speaker: PARTS[index * len(PARTS) // len(heard)] for index, speaker in enumerate(heard)}
    taken: Counter[str] = Counter()
    chosen = []
    for row in rows:
        row["split"] = split_of.get(row["speaker"], row["split"])
        taken[row["split"]] += 1
        if num_utterances is None or taken[row["split"]] <= num_utterances:
            chosen.append(row)
    frames = {}
    for row in chosen:
        info = soundfile.info(source / "flac" / f"{row['utt']}.flac")
        row["num_samples"], row["sample_rate"] = info.frames, info.samplerate
        senones = np.array(alignments[row["utt"]]["senone"], dtype=np.int64)
        middle = np.minimum(3 * np.arange(FRONT_END.num_frames(info.frames)) + 1, len(senones) - 1)
        frames[row["utt"]] = senones[middle], np.array(alignments[row["utt"]]["phone"])[middle]
    classes = back_off([frames[row["utt"]] for row in chosen if row["split"] in PARTS])

    (output / "inventory.json").write_bytes(classes.inventory.to_json())
    write_corpus(
        output / "corpus.parquet",
        (
            Utterance(
                utterance_id=row["utt"],
                audio=str((source / "flac" / f"{row['utt']}.flac").resolve()),
                sha256=hashlib.sha256((source / "flac" / f"{row['utt']}.flac").read_bytes()).hexdigest(),
                sample_rate=row["sample_rate"],
                num_samples=row["num_samples"],
                text=row["text"],
                speaker=row["speaker"],
                split=row["split"],
                hard_labels=classes.labels_T(*frames[row["utt"]]),
            )
            for row in chosen
        ),
        inventory=classes.inventory,
        hard_label_frame_shift_ms=FRONT_END.output_frame_shift_ms,
    )
