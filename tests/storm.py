"""Storm: kill labelling actors, nodes and drivers of real runs with SIGKILL, at random, and account for every frame.

    make storm KILLS=100 [FORMAT=parquet|zarr] [URL=s3://bucket/prefix] [SEED=1]

A Ray cluster of two nodes, an S3 server (Ceph RGW, unless URL is given or RGW is not installed: then a local folder) and jobs
of 24 shards, below a new name at URL. Each run is disturbed until it ends, most often while it labels; a killed driver's job is
run again, as a user would. Whenever a dataset is published it is verified and compared with that of an undisturbed run: content
digest, every object's bytes, every utterance's labels. Prints one JSON line; unless all is well it exits 1 and keeps the logs
and job files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.object_store import ObjectStore
from tests.support import rgw
from tests.support.accounting import Account, Reference, reference_dataset
from tests.support.cluster import RayCluster, ray_cluster
from tests.support.datasets import SHARD_FORMATS
from tests.support.teachers import job_fields, write_job, write_linear_teacher, write_sounds

NUM_SHARDS = 24
KINDS = ("driver", "actor", "node")
PHASES = ("starting", "while_labelling", "publishing")
# A shard takes long enough for kills to land in the work and not between the runs.
_DELAY_SECONDS = 0.6
_NUM_ACTORS = 2
_LABELLING_SECONDS = NUM_SHARDS * _DELAY_SECONDS / _NUM_ACTORS
# Of the runs, to be disturbed before they have committed anything.
_SHARE_WHILE_STARTING = 0.2
_RUN_LIMIT_SECONDS = 600.0
_LONGEST_ABSENCE_SECONDS = 4.0
# Between the kills of one run.
_PAUSE_SECONDS = (0.5, 4.0)
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run in progress, and what was there before it: shards committed, and actors of an earlier driver."""

    process: subprocess.Popen[str]
    store: ObjectStore
    committed_before: int
    foreign_actors: frozenset[int]
    log: Path

    def phase(self) -> str:
        """Labelling is from the first shard that this run has committed to the last one of all."""
        committed = len(self.store.list("commits"))
        if committed == NUM_SHARDS:
            return "publishing"
        return "while_labelling" if committed > self.committed_before else "starting"


class Storm:
    """One cluster and one destination prefix."""

    def __init__(self, folder: Path, url: str, cluster: RayCluster, formats: tuple[str, ...], seed: int) -> None:
        self.folder, self.url, self.cluster, self.formats = folder, url, cluster, formats
        self.rng = random.Random(seed)
        self.account = Account()
        self.sounds = write_sounds(folder / "sounds", [0.3] * NUM_SHARDS)
        self.teacher = write_linear_teacher(folder / "teacher", delay_seconds=_DELAY_SECONDS)

    def job(self, name: str, shard_format: str) -> tuple[Path, str]:
        """The job file and where it writes to."""
        url = f"{self.url}/{name}"
        changes = {
            "destination__shard_seconds": 0.25,
            "destination__format": shard_format,
            "selection__keep_hard_label": True,
            "resources__num_actors": _NUM_ACTORS,
        }
        return write_job(
            self.folder / f"{name}.toml", job_fields(self.sounds.manifest, [self.teacher], url, **changes)
        ), url

    @contextlib.contextmanager
    def running(self, job: Path, url: str) -> Iterator[Run]:
        """A run of ``job``, killed where the block ends before it does."""
        self.account.runs += 1
        store, log = ObjectStore(url), job.with_suffix(".log")
        committed, actors = len(store.list("commits")), frozenset(self.cluster.actors())
        # A pipe that nobody reads would fill up.
        with log.open("a") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "teacher_service.cli", "run", str(job), "--address", self.cluster.gcs],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                text=True,
                env=self.cluster.environment,
            )
        try:
            yield Run(process=process, store=store, committed_before=committed, foreign_actors=actors, log=log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def undisturbed_run(self, shard_format: str) -> tuple[Reference, float]:
        """What it made, and how long it took to start."""
        job, url = self.job(f"reference-{shard_format}", shard_format)
        started = time.monotonic()
        with self.running(job, url) as run:
            process, log = run.process, run.log
            process.wait(_RUN_LIMIT_SECONDS)
        seconds = time.monotonic() - started
        if process.returncode != 0:
            raise RuntimeError(f"the undisturbed run ended with {process.returncode}:\n{log.read_text()}")
        expected = reference_dataset(url)
        assert len(expected.labels) == NUM_SHARDS
        return expected, max(1.0, seconds - _LABELLING_SECONDS)

    def rage(self, num_kills: int) -> Account:
        references = {shard_format: self.undisturbed_run(shard_format) for shard_format in self.formats}
        number = dict.fromkeys(self.formats, 0)
        # Runs at both formats in turn until the kills are done, and every destination begun is completed.
        unfinished: set[str] = set()
        while self.account.kills.total() < num_kills or unfinished:
            calm = self.account.kills.total() >= num_kills
            shard_format = self.rng.choice(sorted(unfinished) if calm else self.formats)
            job, url = self.job(f"{shard_format}-{number[shard_format]}", shard_format)
            reference, start_seconds = references[shard_format]
            if self.disturbed_run(job, url, start_seconds, num_kills):
                self.account.compare(url, reference)
                number[shard_format] += 1
                unfinished.discard(shard_format)
            else:
                unfinished.add(shard_format)
            if self.account.failed_runs:
                break
        return self.account

    def disturbed_run(self, job: Path, url: str, start_seconds: float, num_kills: int) -> bool:
        """Whether the dataset was published; False where the driver was killed first."""
        with self.running(job, url) as run:
            self.disturb(run, start_seconds, num_kills)
            process, log = run.process, run.log
        if process.returncode == -signal.SIGKILL:
            with contextlib.suppress(InputError):
                # Published before the kill: fine. Otherwise it must not look complete.
                open_dataset(url)
                return True
            return False
        if process.returncode != 0:
            self.account.failed_runs.append(f"{job.stem} ended with {process.returncode}: {log.read_text()[-2000:]}")
        return process.returncode == 0

    def disturb(self, run: Run, start_seconds: float, num_kills: int) -> None:
        """Until the run ends; a node that was killed is back then."""
        started = time.monotonic()
        kill_at: float | None = None
        back_at: float | None = None
        if self.rng.random() < _SHARE_WHILE_STARTING:
            kill_at = started + self.rng.uniform(0, start_seconds)
        while run.process.poll() is None:
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if now - started > _RUN_LIMIT_SECONDS:
                self.account.failed_runs.append(f"{run.log.stem}: not done after {_RUN_LIMIT_SECONDS:g} s")
                break
            if back_at is not None:
                if now >= back_at:
                    self.cluster.command("add")
                    back_at = None
            elif self.account.kills.total() >= num_kills:
                continue
            elif kill_at is None:
                if run.phase() == "while_labelling":
                    kill_at = now + self.rng.uniform(0, _LABELLING_SECONDS)
            elif now >= kill_at:
                kind = self.rng.choice(KINDS)
                self.kill(kind, run)
                kill_at = time.monotonic() + self.rng.uniform(*_PAUSE_SECONDS)
                if len(self.cluster.nodes) == 1:
                    back_at = time.monotonic() + self.rng.uniform(0, _LONGEST_ABSENCE_SECONDS)
        if back_at is not None:
            self.cluster.command("add")

    def kill(self, kind: str, run: Run) -> None:
        """Counts where it has hit a run that was alive."""
        phase = run.phase()
        actors = [pid for pid in self.cluster.actors() if pid not in run.foreign_actors]
        if run.process.poll() is not None:
            return
        if kind == "driver":
            run.process.kill()
            if run.process.wait() != -signal.SIGKILL:
                return
        elif kind == "node":
            self.cluster.command("kill")
        elif not actors:
            return
        else:
            try:
                os.kill(self.rng.choice(actors), signal.SIGKILL)
            except ProcessLookupError:
                return
        self.account.kills[kind] += 1
        self.account.phases[phase] += 1
        print(f"storm: {self.account.kills.total()} kills {dict(self.account.kills)}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill labelling runs at random and account for every frame.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--format", choices=SHARD_FORMATS, help="default: both")
    parser.add_argument(
        "--url",
        help="where to write, below a new name; default: a Ceph RGW of its own, or a folder where it is not installed",
    )
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    # SIGTERM unwinds like Ctrl-C, so that nothing is left running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    formats = (arguments.format,) if arguments.format else SHARD_FORMATS
    account = Account()
    try:
        with contextlib.ExitStack() as stack:
            url = arguments.url or str(folder / "labels")
            if "://" not in url:
                # The nodes of the cluster have other working directories.
                url = str(Path(url).resolve())
            if not arguments.url and not rgw.missing_programs():
                server = stack.enter_context(rgw.serve(folder / "rgw"))
                stack.enter_context(rgw.s3_environment(server.environment()))
                url = f"s3://{server.bucket}"
            # The head has room for one of the two actors: losing the other node matters. That one has room beside an actor of a
            # driver that was killed just now.
            cluster = stack.enter_context(ray_cluster(folder / "cluster.log", nodes=2, cpus=3, head_cpus=1))
            # A second storm at the same place must not find the datasets of the first.
            url = f"{url.rstrip('/')}/storm-{uuid.uuid4().hex}"
            account = Storm(folder, url, cluster, formats, arguments.seed).rage(arguments.kills)
    finally:
        if account.all_is_well:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"storm: logs and job files are kept in {folder}", file=sys.stderr)
    for failure in account.failed_runs:
        print(f"storm: {failure}", file=sys.stderr)
    result = {
        "kills": account.kills.total(),
        "by_kind": {kind: account.kills[kind] for kind in KINDS},
        "by_phase": {phase: account.phases[phase] for phase in PHASES},
        "runs": account.runs,
        "datasets": account.datasets,
        "frames": account.frames,
        "expected_frames": account.expected,
        "lost": account.lost,
        "duplicated": account.duplicated,
        "corrupted": account.corrupted,
        "digests_equal": account.other_digests == 0,
        "objects_equal": account.other_objects == 0,
        "failed_runs": len(account.failed_runs),
        "store": url.partition("://")[0] if "://" in url else "local",
        "formats": list(formats),
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(result), flush=True)
    sys.exit(0 if account.all_is_well else 1)


if __name__ == "__main__":
    main()
