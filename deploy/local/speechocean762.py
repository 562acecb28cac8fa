"""The speechocean762 experiment: three teachers, essence + hard against hard only, three seeds, equal budgets.

    python deploy/local/speechocean762.py CORPUS_FOLDER OUTPUT_FOLDER

CORPUS_FOLDER holds ``utterances.tsv``, ``alignments.parquet`` (senone and phone of every 10 ms frame, by pocketsphinx' en-us
model) and ``flac/``. Every step is one of the three commands; what is done already is passed over, so the script can be
interrupted and run again.

Targets are senones at a frame shift of 30 ms (the label of the middle one of three frames). Senones with fewer than
30 frames in the training speech are backed off to the most frequent senone of the same phone (``senones.py``). Speakers of
train, dev and test are disjoint; dev is carved from the training speakers; test is used for nothing but the final table.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import soundfile
from recipe import Arm, Model, Recipe, Teacher, Workspace

from softlabel_schemas import InputError, Utterance, write_corpus
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.senones import back_off

NUM_DEV_SPEAKERS = 15
FRONT_END = Fbank(stack=3)


def prepare(
    source: Path, output: Path, *, num_utterances: int | None = None, parts: Sequence[str] = ("train",)
) -> None:
    """Write ``corpus.parquet`` and ``inventory.json``.

    Args:
        num_utterances: limits each split (for tests).
        parts: splits of the training speech, of equally many speakers each.
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
    split_of |= {speaker: parts[index * len(parts) // len(heard)] for index, speaker in enumerate(heard)}
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
    classes = back_off([frames[row["utt"]] for row in chosen if row["split"] in parts])

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
    (output / "inventory.json").write_bytes(classes.inventory.to_json())


# Splits of the training speech by speaker, for what learns from a share of it.
PARTS = ("train-1", "train-2", "train-3", "train-4")
MEMBER = Model(architecture="conv_glu")
SMALL = Model(architecture="conv_glu", arguments={"hidden": 64, "num_layers": 4, "kernel_size": 3})
ESSENCE = 'weight = 0.8\ntail = "ghost"\n'
TRAINING = "epochs = {epochs}\nbatch_seconds = 40.0\nnum_threads = 1\n"


def recipe(output: Path, *, epochs: int, seeds: tuple[int, ...]) -> Recipe:
    training = TRAINING.format(epochs=epochs)
    return Recipe(
        workspace=Workspace(output),
        teachers=(
            Teacher(name="tdnn", model=Model(architecture="tdnn")),
            Teacher(name="blstm", model=Model(architecture="blstm", arguments={"hidden": 112})),
            Teacher(name="conv_glu", model=Model(architecture="conv_glu"), num_mel_bins=64),
        ),
        arms=(
            Arm(name="member-hard", model=MEMBER),
            Arm(name="member-essence", model=MEMBER, soft_labels=ESSENCE),
            Arm(name="small-hard", model=SMALL),
            Arm(name="small-essence", model=SMALL, soft_labels=ESSENCE),
        ),
        seeds=seeds,
        selection='policy = "mass"\nmass = 0.95\nmax_entries = 20\nkeep_hard_label = true\n',
        teacher_training=training,
        student_training=training,
        shard_seconds=600.0,
    )


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--epochs", default=15, show_default=True, help="For every model: equal budgets.")
@click.option("--seeds", default=3, show_default=True, help="Students per arm.")
@click.option("--utterances", type=int, help="Use only so many utterances of each split (for a quick try).")
def main(corpus: Path, output: Path, epochs: int, seeds: int, utterances: int | None) -> None:
    """Run the whole experiment; about an hour on two cores."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "corpus.parquet").exists():
        try:
            prepare(corpus, output, num_utterances=utterances)
        except InputError as error:
            raise click.UsageError(str(error)) from None
    recipe(output, epochs=epochs, seeds=tuple(range(seeds))).run()


if __name__ == "__main__":
    main()
