"""The demo: the main job on synthetic speech, in a few minutes on two cores.

    python deploy/local/demo.py OUTPUT_FOLDER

eSpeak NG speaks made-up sentences in several voices; its phoneme events give the hard labels (three states per phone, 30 ms
frames). Voices of train, dev and test are disjoint. Then: three different teachers, a labelled dataset, students with hard
labels only and with essence + hard labels, and the report. It shows the steps; synthetic speech proves nothing about real
speech (see ``essence.py`` for that).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import soundfile
from recipe import Arm, Model, Recipe, Teacher, Workspace, stop_with_commands
from synthesis import SAMPLE_RATE, SILENCE, frame_labels, synthesize_corpus

from softlabel_schemas import ClassInventory, Utterance, load_corpus, write_corpus
from softlabel_schemas.command_line import progress
from softlabel_schemas.front_end import Fbank

FRONT_END = Fbank(sample_rate=SAMPLE_RATE, stack=3)
STATES_PER_PHONE = 3


def prepare(output: Path, *, num_train: int, num_dev: int, num_test: int) -> None:
    """Speak the corpus; write ``audio/``, ``inventory.json`` and, last, ``corpus.parquet``."""
    (output / "audio").mkdir(parents=True, exist_ok=True)
    counts = {"num_train_sentences": num_train, "num_dev_sentences": num_dev, "num_test_sentences": num_test}
    utterances, labels = [], []
    with progress("speak", sum(counts.values()), "sentences") as advance:
        for utterance in synthesize_corpus(**counts):
            advance(len(utterances))
            audio = output / "audio" / f"{utterance.utterance_id}.flac"
            soundfile.write(audio, utterance.samples, SAMPLE_RATE)
            num_frames = FRONT_END.num_frames(len(utterance.samples))
            frame_shift = int(SAMPLE_RATE * FRONT_END.output_frame_shift_ms / 1000)
            labels.append(frame_labels(utterance.segments, num_frames=num_frames, frame_shift=frame_shift))
            utterances.append(
                Utterance(
                    utterance_id=utterance.utterance_id,
                    audio=f"audio/{audio.name}",
                    sample_rate=SAMPLE_RATE,
                    num_samples=len(utterance.samples),
                    text=utterance.text,
                    speaker=utterance.speaker,
                    split=utterance.split,
                )
            )
    spoken_phones = {phone for phones, _ in labels for phone in phones}
    names = [(phone, state) for phone in sorted(spoken_phones) for state in range(STATES_PER_PHONE)]
    class_id = {pair: index for index, pair in enumerate(names)}
    inventory = ClassInventory(
        names=tuple(f"{phone}/{state}" for phone, state in names),
        phones=tuple(phone for phone, _ in names),
        silence_phones=(SILENCE,),
    )
    (output / "inventory.json").write_bytes(inventory.to_json())
    write_corpus(
        output / "corpus.parquet",
        (
            replace(
                utterance,
                hard_labels=np.array([class_id[pair] for pair in zip(*pairs, strict=True)], dtype=np.int32),
            )
            for utterance, pairs in zip(utterances, labels, strict=True)
        ),
        inventory=inventory,
        hard_label_frame_shift_ms=FRONT_END.output_frame_shift_ms,
    )


def check_size(output: Path, sentences: int) -> None:
    """Raises UsageError where the folder's corpus has another size: it would count as this one."""
    found = len(load_corpus(output / "corpus.parquet").select_splits(["train"]))
    if found != sentences:
        raise click.UsageError(
            f"{output} holds the demo with --sentences {found}, now {sentences}; give what it has, or use another output folder"
        )


STUDENT = Model(architecture="conv_glu", arguments={"hidden": 48, "num_layers": 3, "kernel_size": 3})


def recipe(output: Path, *, epochs: int, seeds: tuple[int, ...]) -> Recipe:
    training = f"epochs = {epochs}\nbatch_seconds = 20.0\nlearning_rate = 3e-3\nnum_threads = 1\n"
    return Recipe(
        workspace=Workspace(output),
        teachers=(
            Teacher(name="tdnn", model=Model(architecture="tdnn", arguments={"hidden": 128})),
            Teacher(name="blstm", model=Model(architecture="blstm", arguments={"hidden": 80})),
            Teacher(name="conformer", model=Model(architecture="conformer", arguments={"hidden": 96, "num_layers": 2})),
        ),
        arms=(
            Arm(name="student-hard", model=STUDENT),
            Arm(name="student-essence", model=STUDENT, soft_labels='weight = 0.8\ntail = "ghost"\n'),
        ),
        seeds=seeds,
        selection='policy = "mass"\nmass = 0.95\nmax_entries = 20\nkeep_hard_label = true\n',
        teacher_training=training,
        student_training=training,
        shard_seconds=120.0,
    )


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--epochs", default=16, show_default=True, help="For every model: equal budgets.")
@click.option("--seeds", default=2, show_default=True, help="Students per arm.")
@click.option("--sentences", default=300, show_default=True, help="For training; a fifth as many more for the test.")
def main(output: Path, epochs: int, seeds: int, sentences: int) -> None:
    """Run the whole demo in OUTPUT; run again to go on after an interruption."""
    stop_with_commands()
    if not (output / "corpus.parquet").exists():
        prepare(output, num_train=sentences, num_dev=max(8, sentences // 8), num_test=max(12, sentences // 5))
    check_size(output, sentences)
    recipe(output, epochs=epochs, seeds=tuple(range(seeds))).run()


if __name__ == "__main__":
    main()
