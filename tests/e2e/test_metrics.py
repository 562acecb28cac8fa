"""What a run tells of itself: metrics at a node's endpoint, as Prometheus reads them, and the actors' logs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from softlabel_schemas import open_dataset
from softlabel_schemas.verification import verify
from teacher_service.cli import main
from teacher_service.status import read_status
from tests.support.cluster import ray_cluster
from tests.support.processes import LIMIT_SECONDS
from tests.support.teachers import job_fields, write_job, write_linear_teacher, write_sounds

pytestmark = pytest.mark.ray

NUM_SHARDS = 12
# Of metrics, by name, state and the first digits of the dataset's fingerprint.
Values = dict[tuple[str, str, str], float]


@dataclass(slots=True, kw_only=True)
class Observed:
    url: Path
    logs: list[str] = field(default_factory=list)
    samples: list[Values] = field(default_factory=list)

    def last(self, name: str, state: str = "") -> float:
        fingerprint = open_dataset(self.url).manifest.fingerprint[:12]
        found = [
            values[key] for values in self.samples if (key := (f"ray_softlabels_{name}", state, fingerprint)) in values
        ]
        assert found, f"{name} was never exported"
        return found[-1]


def scrape(url: str) -> Values:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, sample.labels.get("state", ""), sample.labels["fingerprint"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("ray_softlabels_")
    }


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """A run, one of whose shards fails once, on a cluster that reports twice a second."""
    folder = tmp_path_factory.mktemp("metrics")
    sounds = write_sounds(folder / "sounds", [0.3, 0.5] * NUM_SHARDS)
    odd = {"factory": "tests.support.odd_teachers:odd_once_model", "marker": str(folder / "marker"), "what": "raise"}
    teacher = write_linear_teacher(folder / "teacher", delay_seconds=0.2, **odd)
    fields = job_fields(sounds.manifest, [teacher], folder / "labels", destination__shard_seconds=0.75)
    job, found = write_job(folder / "job.toml", fields), Observed(url=folder / "labels")
    variables = {"RAY_metrics_report_interval_ms": "500"}
    # Planned as if the failure had been.
    (folder / "marker").touch()
    planned = CliRunner().invoke(main, ["plan", str(job), "--sample", "1", "--save"])
    assert planned.exit_code == 0, planned.output
    (folder / "marker").unlink()
    with ray_cluster(folder / "ray.log", nodes=1, cpus=2, head_cpus=2, variables=variables) as cluster:
        command = [sys.executable, "-m", "teacher_service.cli", "run", str(job), "--address", cluster.gcs]
        deadline = time.monotonic() + LIMIT_SECONDS
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=cluster.environment
        ) as run:
            while run.poll() is None:
                if time.monotonic() > deadline:
                    run.kill()
                if values := scrape(cluster.metrics[0]):
                    found.samples.append(values)
                time.sleep(0.25)
            assert run.stdout is not None
            assert run.returncode == 0, run.stdout.read()
        logs = sorted((cluster.session / "logs").glob("worker-*.err"))
        found.logs = [line for log in logs for line in log.read_text().splitlines()]
    return found


def test_what_the_actors_did_is_exported(observed: Observed) -> None:
    dataset = open_dataset(observed.url)
    num_frames = sum(shard.num_frames for shard in dataset.manifest.shards)
    # The last report may be of a moment before the end; the shard that failed was labelled in part, or twice.
    assert 0 < observed.last("frames_total") <= 2 * num_frames
    speech, padded = observed.last("speech_total"), observed.last("padded_total")
    assert 0 < speech < padded
    assert 0 < observed.last("stored_bytes_total") <= sum(shard.num_bytes for shard in dataset.manifest.shards)
    # The teacher sleeps a fifth of a second in each batch.
    busy, idle = observed.last("teacher_busy_total"), observed.last("teacher_idle_total")
    assert busy >= 0.2
    assert idle > 0


def test_shards_by_state_add_up_and_retries_are_counted(observed: Observed) -> None:
    for values in observed.samples:
        states = {state: value for (name, state, _), value in values.items() if name == "ray_softlabels_shards"}
        if states:
            assert set(states) == {"waiting", "in_work", "committed", "given_up"}
    total = sum(observed.last("shards", state) for state in ("waiting", "in_work", "committed", "given_up"))
    assert total == open_dataset(observed.url).num_shards
    assert observed.last("retries_total") == 1


def test_a_planned_run_leaves_a_record_of_what_it_took(observed: Observed) -> None:
    status = read_status(str(observed.url))
    assert status.plan is not None
    assert status.actual is not None
    assert status.plan.num_puts == status.actual.num_puts
    assert status.plan.num_frames.expected == pytest.approx(status.actual.num_frames, rel=0.01)
    assert status.actual.wall_hours is not None
    assert status.actual.actor_hours == pytest.approx(status.actual.wall_hours, rel=0.01)
    # A fifth of a second for each of its batches, at the least.
    assert status.actual.wall_hours > 0.2 * NUM_SHARDS / 3600
    # What it records lies beside the dataset.
    assert [problem for _, problem in verify(open_dataset(observed.url)) if problem] == []


def test_the_actors_logs_name_the_dataset_and_the_shard(observed: Observed) -> None:
    dataset = open_dataset(observed.url)
    lines = [json.loads(line) for line in observed.logs if line.startswith('{"time"')]
    assert {line["fingerprint"] for line in lines} == {dataset.manifest.fingerprint}
    committed = {line["shard"]: line for line in lines if line["event"] == "shard committed"}
    assert [committed[index]["frames"] for index in range(dataset.num_shards)] == [
        shard.num_frames for shard in dataset.manifest.shards
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"]) for line in lines)
    (failed,) = [line for line in lines if line["event"] == "shard failed"]
    assert failed["level"] == "ERROR"
    assert failed["shard"] in committed
    assert "RuntimeError" in failed["error"]
