"""Throughput of labelling against a bare loop of the same teachers over the same batches that writes nothing; padding.

    python -m tests.benchmarks.job            # about five minutes on an idle machine
    python -m tests.benchmarks.job --json

One process, one torch thread; an actor as Ray runs it, with two shards in hand, against two loops, once with models on the
CPU (which share its cores with reading and writing) and once with one that takes as long but computes nothing, as where the
models are on a device:

- bare: the features are in memory, and only the teachers run;
- reading: the loop reads, decodes and pads each batch too, one after the other.

``teacher-service run`` itself, with Ray and a process of its own, is timed from the first commit to the last, so that loading
is not in it; the loops' commits are counted in the same way, without the first shard's time.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softlabel_schemas import ClassInventory
from softlabel_schemas.bundle import write_bundle
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.plan import ShardRange, plan_shards
from softlabel_schemas.utterance_reader import UtteranceReader
from student_trainer.models import build_acoustic_model
from teacher_service.batching import batch_rows, pad
from teacher_service.config import TeacherConfig
from teacher_service.job import PreparedJob, missing_shards, prepare
from teacher_service.labelling_actor import LabellingActor
from teacher_service.ray_job import run_job
from teacher_service.teacher import Teacher
from tests.benchmarks.command_line import benchmark_parser, print_figures
from tests.benchmarks.figures import Figure, interleaved, median_and_spread, ratio_of_rounds
from tests.support.teachers import OWN_FACTORY, make_job, state, write_linear_teacher, write_sounds

INVENTORY = ClassInventory(names=tuple(f"senone-{index}" for index in range(660)))
# 3.7 and 1.9 million parameters.
_TEACHERS: dict[str, dict[str, Any]] = {
    "conformer": {"hidden": 192, "num_layers": 4, "num_heads": 4, "kernel_size": 15},
    "tdnn": {"hidden": 384, "num_layers": 5},
}
_SPEECHOCEAN762 = Path("../shared/data/speechocean762/utterances.tsv")
# Shards of this benchmark are 120 s: a batch is a quarter of that, in a real one a sixtieth.
_BATCH_SECONDS = 30.0


def figures(
    *, num_shards: int = 5, shard_seconds: float = 120.0, repeats: int = 3, with_ray: bool = True
) -> list[Figure]:
    """
    Args:
        with_ray: ``teacher-service run`` too.
    """
    found = []
    for where, write in (("on the CPU", write_teachers), ("elsewhere", write_waiting_teacher)):
        with tempfile.TemporaryDirectory(prefix="job-") as folder:
            bench = JobBench(Path(folder), num_shards, shard_seconds, write(Path(folder)))
            found += _job_figures(bench, where, repeats, with_ray=with_ray)
    return found + padding()


def _job_figures(bench: JobBench, where: str, repeats: int, *, with_ray: bool) -> list[Figure]:
    functions: dict[str, Callable[[], float]] = {"bare": bench.bare, "reading": bench.reading, "actor": bench.actor}
    if with_ray:
        functions["teacher-service run"] = bench.on_ray
    measured = dict(zip(functions, interleaved(list(functions.values()), repeats), strict=True))
    return [
        _against(measured, where, name, baseline) for name in list(functions)[2:] for baseline in ("bare", "reading")
    ]


def _against(measured: dict[str, list[float]], where: str, name: str, baseline: str) -> Figure:
    value, spread = median_and_spread(measured[name])
    ratio = ratio_of_rounds(measured[name], measured[baseline])
    features = "features in memory" if baseline == "bare" else "features read in it"
    return Figure(
        name=f"job: {name}, models {where}, {features}",
        unit="s of speech/s",
        value=value,
        baseline=statistics.median(measured[baseline]),
        baseline_name=f"loop of the teachers, {features}",
        ratio_of_rounds=ratio,
        target="ratio >= 0.95",
        met=ratio >= 0.95,
        spread=spread,
    )


class JobBench:
    """A corpus of tones, an ensemble, and ways to run it; each returns seconds of speech per second."""

    def __init__(self, folder: Path, num_shards: int, shard_seconds: float, teachers: list[TeacherConfig]) -> None:
        self._folder, self._runs = folder, 0
        rng = np.random.default_rng(0)
        seconds = librispeech_like(rng, round(num_shards * shard_seconds))
        seconds = seconds[: int(np.searchsorted(seconds.cumsum(), num_shards * shard_seconds))]
        self._manifest = write_benchmark_corpus(folder / "sounds", seconds)
        self._teachers = teachers
        self._shard_seconds = shard_seconds
        self._job = self._prepare()
        missing_shards(self._job)
        self._actor = LabellingActor(self._job)
        self._actor.load()
        # Once, not timed: the audio's features, as the teachers take them.
        self._batches = [list(self._read(shard)) for shard in range(len(self._job.plan))]

    def _prepare(self, num_actors: int = 1) -> PreparedJob:
        self._runs += 1
        return prepare(
            make_job(
                self._manifest,
                self._teachers,
                self._folder / f"labels-{self._runs}",
                destination__shard_seconds=self._shard_seconds,
                resources__batch_seconds=_BATCH_SECONDS,
                resources__num_actors=num_actors,
                selection={"policy": "mass", "mass": 0.95, "max_entries": 20},
            )
        )

    @property
    def _models(self) -> list[Teacher]:
        return self._actor._teachers

    def _read(self, shard: int) -> Any:
        """Padded features of each batch of a shard, for each teacher."""
        shard_range, corpus = self._job.plan[shard], self._job.corpus
        rows = corpus.read(shard_range.first_row, shard_range.num_rows)
        reader, utterances = UtteranceReader(rows), list(rows)
        # All of these teachers take the same features.
        (front_end,) = {teacher.front_end.model_dump_json(): teacher.front_end for teacher in self._models}.values()
        for indices in batch_rows(rows.seconds(), self._job.document.storage.batch_seconds):
            padded = pad([reader.features(utterances[index], [front_end])[0] for index in indices])
            yield [padded] * len(self._models)

    def bare(self) -> float:
        return self._loop(lambda shard: self._batches[shard])

    def reading(self) -> float:
        return self._loop(self._read)

    def _loop(self, batches_of: Callable[[int], Any]) -> float:
        ends = {}
        for shard in range(len(self._job.plan)):
            for batch in batches_of(shard):
                _run_all(self._models, batch)
            ends[shard] = time.monotonic()
        return self._rate(ends)

    def actor(self) -> float:
        """Two shards in hand, as Ray calls it."""
        self._job = self._prepare()
        missing_shards(self._job)
        self._actor._job, self._actor._store = self._job, self._job.store()
        ends = {}

        def label(shard: ShardRange) -> None:
            self._actor.label(shard)
            ends[shard.index] = time.monotonic()

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(label, self._job.plan))
        return self._rate(ends)

    def on_ray(self, num_actors: int = 1) -> float:
        """By the times of the commit records."""
        job = self._prepare(num_actors)
        run_job(job)
        folder = Path(job.config.destination.url) / "commits"
        return self._rate(commit_times(folder))

    def _rate(self, ends: dict[int, float]) -> float:
        return steady_rate(self._job.seconds_of_shard, ends)


def commit_times(folder: Path) -> dict[int, float]:
    """Of each shard, in seconds."""
    return {int(path.stem): path.stat().st_mtime for path in folder.iterdir()}


def steady_rate(seconds_of_shard: Sequence[float], ends: dict[int, float], num_actors: int = 1) -> float:
    """Seconds of speech per second once all actors are at work: from the end that is one for each of them on.

    Args:
        ends: of each shard, in seconds. They need not come in the shards' order: of two in hand the second may end first.
    """
    order = sorted(ends, key=lambda shard: ends[shard])
    seconds = sum(seconds_of_shard[shard] for shard in order[num_actors:])
    return seconds / (ends[order[-1]] - ends[order[num_actors - 1]])


def _run_all(teachers: Sequence[Teacher], batch: Sequence[tuple[Tensor, Tensor]]) -> None:
    for teacher, (features_BTD, lengths_B) in zip(teachers, batch, strict=True):
        teacher.logits(features_BTD, lengths_B)


def write_benchmark_corpus(folder: Path, seconds: Sequence[float] | npt.NDArray[np.float64]) -> str:
    """Tones of these durations, with hard labels of :data:`INVENTORY`; the manifest's path."""
    return write_sounds(folder, [float(duration) for duration in seconds]).write(inventory=INVENTORY).manifest


def write_teachers(folder: Path) -> list[TeacherConfig]:
    configs = []
    for name, arguments in _TEACHERS.items():
        of_model = {
            "architecture": name,
            "num_features": 40,
            "num_classes": INVENTORY.num_classes,
            "arguments": arguments,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build_acoustic_model(**of_model)
        write_bundle(
            folder / name,
            name=name,
            model=state(model),
            factory=OWN_FACTORY,
            arguments=of_model,
            front_end=Fbank(),
            inventory=INVENTORY,
            frame_shift_ms=10.0,
        )
        configs.append(TeacherConfig(bundle=str(folder / name)))
    return configs


def write_waiting_teacher(folder: Path) -> list[TeacherConfig]:
    """One that sleeps for half a second a batch, sixty times as fast as its speech."""
    arguments = {"num_classes": INVENTORY.num_classes, "delay_seconds": 0.5}
    model = state(torch.nn.ModuleDict({"layer": torch.nn.Linear(40, INVENTORY.num_classes)}))
    return [write_linear_teacher(folder / "waiting", model=model, inventory=INVENTORY, **arguments)]


# Padding


def padding() -> list[Figure]:
    """Of shards of two hours in batches of two minutes, the defaults; durations alone decide it."""
    rng = np.random.default_rng(0)
    corpora = {"LibriSpeech-like": librispeech_like(rng, 30_000)}
    if _SPEECHOCEAN762.exists():
        with _SPEECHOCEAN762.open(encoding="utf-8") as file:
            corpora["speechocean762"] = np.array(
                [float(row["seconds"]) for row in csv.DictReader(file, delimiter="\t")]
            )
    return [_padding(name, seconds_N) for name, seconds_N in corpora.items()]


def _padding(name: str, seconds_N: npt.NDArray[np.float64]) -> Figure:
    padded = 0.0
    for shard in plan_shards(seconds_N, 7200.0):
        of_shard = seconds_N[shard.first_row : shard.first_row + shard.num_rows]
        padded += sum(of_shard[batch].max() * len(batch) for batch in batch_rows(of_shard, 120.0))
    share = float(1 - seconds_N.sum() / padded)
    return Figure(
        name=f"padding, {name} ({len(seconds_N):,} utterances)",
        unit="share of the frames",
        value=share,
        target="<= 0.05",
        met=share <= 0.05,
    )


def librispeech_like(rng: np.random.Generator, num_utterances: int) -> npt.NDArray[np.float64]:
    """Durations in seconds: two of three between 12 and 17, the others from 1.3 on; 12.3 on average, at most 35."""
    is_long = rng.random(num_utterances) < 0.65
    seconds_N = np.where(is_long, rng.normal(14.8, 1.2, num_utterances), rng.uniform(1.3, 14.0, num_utterances))
    return seconds_N.clip(1.3, 35.0)


def main() -> None:
    options = benchmark_parser(__doc__, repeats=3).parse_args()
    print_figures(figures(repeats=options.repeats), as_json=options.json)


if __name__ == "__main__":
    main()
