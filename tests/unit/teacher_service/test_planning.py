"""A plan against what the job then came to: exact where the sample is the whole corpus, within its range where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from softlabel_schemas.errors import InputError
from softlabel_schemas.utterance_reader import UtteranceError
from teacher_service import calibration, planning
from teacher_service.calibration import calibrate
from teacher_service.cli import main
from teacher_service.job import PreparedJob, prepare
from teacher_service.job_plan import Plan, Prices
from teacher_service.planning import make_plan
from teacher_service.run_record import Actual, RunRecord, read_actual, save_plan, save_run
from tests.support.labelling import run_here
from tests.support.teachers import LOUDNESS, job_fields, make_job, write_job, write_linear_teacher, write_sounds

DURATIONS = [0.4 + 0.05 * (index * 7 % 19) for index in range(60)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sounds(folder / "sounds", DURATIONS)
    write_linear_teacher(folder / "teacher")
    return folder


def job_of(corpus: Path, url: Path, **changes: Any) -> PreparedJob:
    changes = {"destination__shard_seconds": 10.0} | changes
    teacher = write_linear_teacher(corpus / "teacher")
    return prepare(make_job(str(corpus / "sounds" / "corpus.parquet"), [teacher], url, **changes))


def labelled(job: PreparedJob) -> Actual:
    """The job done, without Ray."""
    run_here(job)
    return read_actual(job.store())


def plan_of(job: PreparedJob, num_batches: int) -> Plan:
    return make_plan(job, calibrate(job, num_batches), None)


@pytest.mark.parametrize(
    ("shard_format", "num_batches", "tolerance"), [("parquet", 100, 0.03), ("parquet", 6, 0.05), ("zarr", 6, 0.05)]
)
def test_frames_bytes_and_objects_come_out_as_planned(
    corpus: Path, tmp_path: Path, shard_format: str, num_batches: int, tolerance: float
) -> None:
    job = job_of(corpus, tmp_path / "labels", destination__format=shard_format)
    plan = plan_of(job, num_batches)
    assert not (tmp_path / "labels").exists()
    actual = labelled(job)
    assert plan.num_shards == actual.num_shards == len(job.plan)
    assert plan.num_puts == actual.num_puts
    assert plan.num_frames.expected == pytest.approx(actual.num_frames, rel=tolerance / 2)
    assert plan.num_bytes.expected == pytest.approx(actual.num_bytes, rel=tolerance)
    assert plan.num_bytes.low < plan.num_bytes.expected < plan.num_bytes.high
    assert plan.sampled_seconds == pytest.approx(min(sum(DURATIONS), num_batches * 4.0), rel=0.25)


def test_the_sample_is_a_function_of_the_job(corpus: Path, tmp_path: Path) -> None:
    job = job_of(corpus, tmp_path / "labels")
    first, second = plan_of(job, 3), plan_of(job, 3)
    for name in ("num_frames", "num_bytes", "num_puts", "num_gets", "padding", "sampled_seconds"):
        assert getattr(first, name) == getattr(second, name)
    assert first.sampled_seconds < sum(DURATIONS) / 2


def test_padding_is_that_of_the_batches_of_whole_shards(corpus: Path, tmp_path: Path) -> None:
    """Though a sample of one batch would have little."""
    job = job_of(corpus, tmp_path / "labels", destination__shard_seconds=1000.0)
    padded = labelled_seconds = 0.0
    rows = job.corpus.read(0, len(DURATIONS))
    for batch in calibration._batches(job, rows, []):
        seconds = rows.seconds()[batch]
        padded, labelled_seconds = padded + seconds.max() * len(batch), labelled_seconds + seconds.sum()
    assert plan_of(job, 1).padding == pytest.approx(1 - labelled_seconds / padded)


@pytest.mark.parametrize(
    ("selection", "refused"),
    [
        ({"policy": "top_k", "k": 4}, True),
        ({"policy": "byte_budget", "bytes_per_frame": 6.0, "max_entries": 8}, True),
        # Draws differ by what posteriors differ, and by chance.
        ({"policy": "random_sampling", "draws": 5}, False),
    ],
)
def test_a_teacher_that_hears_the_padding(
    corpus: Path, tmp_path: Path, selection: dict[str, Any], refused: bool
) -> None:
    deaf = write_linear_teacher(tmp_path / "deaf")
    hearing = write_linear_teacher(tmp_path / "hearing", factory="tests.support.odd_teachers:unmasked_model")
    for teacher in (deaf, hearing):
        manifest = str(corpus / "sounds" / "corpus.parquet")
        job = prepare(make_job(manifest, [teacher], tmp_path / "labels", selection=selection))
        if teacher == hearing and refused:
            with pytest.raises(
                InputError, match=r"utterance utt-\d+ has other posteriors in a batch than alone .KL .* nats in"
            ):
                calibrate(job, 2)
            # One at a time it is right.
            alone = make_job(
                manifest, [teacher], tmp_path / "labels", selection=selection, resources__batch_seconds=0.1
            )
            calibrate(prepare(alone), 2)
        else:
            calibrate(job, 2)


def test_a_slow_teacher_is_planned_to_take_its_time(corpus: Path, tmp_path: Path) -> None:
    """A tenth of a second for each batch, and every batch full but the last of a shard."""
    teacher = write_linear_teacher(tmp_path / "slow", delay_seconds=0.1)
    fields = job_fields(str(corpus / "sounds" / "corpus.parquet"), [teacher], tmp_path / "labels")
    job = prepare(make_job(fields["corpus"]["manifest"], [teacher], tmp_path / "labels"))
    made = calibrate(job, 4)
    plan = make_plan(job, made, None)
    num_batches = sum(DURATIONS) * made.padding / 4.0
    least = (0.1 * num_batches) / 3600
    assert least * 0.8 < plan.wall_hours.expected
    two = make_plan(with_actors(job, 2), made, None)
    startup = made.startup_seconds / 3600
    assert two.wall_hours.expected - startup == pytest.approx((plan.wall_hours.expected - startup) / 2, rel=0.2)
    assert two.actor_hours.expected == pytest.approx(2 * two.wall_hours.expected)


def with_actors(job: PreparedJob, num_actors: int) -> PreparedJob:
    resources = job.config.resources.model_copy(update={"num_actors": num_actors})
    config = job.config.model_copy(update={"resources": resources})
    return PreparedJob(
        config=config,
        document=job.document,
        inventory=job.inventory,
        corpus=job.corpus,
        plan=job.plan,
        seconds_of_shard=job.seconds_of_shard,
    )


@pytest.mark.parametrize(("num_actors", "longest"), [(1, 9.0), (2, 6.0), (3, 5.0), (9, 4.0)])
def test_the_busiest_actor_decides(num_actors: int, longest: float) -> None:
    assert planning._makespan([1.0, 2.0, 2.0, 4.0], num_actors) == longest


def test_what_cannot_be_labelled_is_known_beforehand(tmp_path: Path) -> None:
    write_sounds(tmp_path / "sounds", [0.5] * 8)
    (tmp_path / "sounds" / "utt-003.wav").unlink()
    with pytest.raises(UtteranceError, match="utt-003"):
        plan_of(job_of(tmp_path, tmp_path / "labels"), 100)
    plan = plan_of(job_of(tmp_path, tmp_path / "labels", errors__on_error="skip"), 100)
    assert (plan.num_sampled_skipped, plan.num_utterances) == (1, 8)
    for path in (tmp_path / "sounds").glob("*.wav"):
        path.unlink()
    with pytest.raises(InputError, match="no utterance of the sample could be labelled, the first: utterance utt-000"):
        plan_of(job_of(tmp_path, tmp_path / "labels", errors__on_error="skip"), 100)


def test_batches_that_are_skipped_whole(tmp_path: Path) -> None:
    """Store nothing, and no overhead of a shard. What is planned is what the job then comes to."""
    write_sounds(tmp_path / "sounds", [3.0] * 12)
    for index in (2, 5):
        (tmp_path / "sounds" / f"utt-{index:03d}.wav").write_bytes(b"not audio")
    changes = {"errors": {"on_error": "skip", "max_skipped_fraction": 1.0}, "destination__shard_seconds": 36.0}
    job = job_of(tmp_path, tmp_path / "labels", **changes)
    made = calibrate(job, 12)
    assert [batch.num_frames for batch in made.batches].count(0) == 2
    plan = make_plan(job, made, None)
    actual = labelled(job)
    assert plan.num_frames.expected == actual.num_frames
    assert plan.num_bytes.expected == pytest.approx(actual.num_bytes, rel=0.05)
    assert plan.num_bytes.low > 0


def test_a_teacher_that_does_not_run(tmp_path: Path) -> None:
    """It is no utterance's fault, and no defect of this program: without a traceback."""
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.5], loud=[1])
    factory = "tests.support.teachers:faulty_model"
    faulty = write_linear_teacher(tmp_path / "faulty", factory=factory, fault="device", above=LOUDNESS)
    job = write_job(tmp_path / "job.toml", job_fields(sounds.manifest, [faulty], tmp_path / "labels"))
    result = CliRunner().invoke(main, ["plan", str(job)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: the sample could not be labelled: CUDA error: an illegal memory access" in result.stderr


def test_a_job_for_gpus_is_not_planned_without_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"resources\.gpus_per_actor is 1: the job labels on GPUs, .* finds none here"):
        plan_of(job_of(corpus, tmp_path / "labels", resources__gpus_per_actor=1), 1)


def test_prices(corpus: Path, tmp_path: Path) -> None:
    job = job_of(corpus, tmp_path / "labels")
    prices = Prices(currency="EUR", actor_hour=2.0, per_1000_puts=5.0, per_1000_gets=0.5, gib_month=1024.0)
    plan = make_plan(job, calibrate(job, 2), prices)
    assert plan.cost is not None
    assert plan.cost.labelling.expected == pytest.approx(2 * plan.actor_hours.expected)
    assert plan.cost.requests == pytest.approx(plan.num_puts * 0.005 + plan.num_gets * 0.0005)
    assert plan.cost.storage_month.high == pytest.approx(plan.num_bytes.high / 2**20)


# The command, and what status makes of it


def command(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(args))
    return result.exit_code, result.stdout, result.stderr


def test_the_command_saves_nothing_unless_asked(corpus: Path, tmp_path: Path) -> None:
    teacher = write_linear_teacher(corpus / "teacher")
    fields = job_fields(str(corpus / "sounds" / "corpus.parquet"), [teacher], "labels")
    job = write_job(tmp_path / "job.toml", fields)
    (tmp_path / "prices.toml").write_text('actor_hour = 1.5\ncurrency = "CHF"\n')
    code, text, _ = command("plan", str(job), "--sample", "2", "--prices", str(tmp_path / "prices.toml"))
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()[1:]] == [
        "sample", "shards", "frames", "stored", "requests", "time", "padding", "memory", "cost"
    ]  # fmt: skip
    assert "CHF labelling" in text
    assert not (tmp_path / "labels").exists()
    code, text, _ = command("plan", str(job), "--sample", "2", "--save", "--json")
    assert code == 0
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["plan.json"]
    assert json.loads(text)["num_utterances"] == len(DURATIONS)


def test_unknown_prices_are_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text("actor_hours = 1.5\n")
    code, _, text = command("plan", "job.toml", "--prices", str(tmp_path / "prices.toml"))
    assert code == 2
    assert "unknown key 'actor_hours'; did you mean 'actor_hour'?" in text


def test_status_shows_what_was_planned_beside_what_came(corpus: Path, tmp_path: Path) -> None:
    job = job_of(corpus, tmp_path / "labels")
    save_plan(job.store(), plan_of(job, 4))
    labelled(job)
    code, text, _ = command("status", str(tmp_path / "labels"))
    lines = [line.split() for line in text.splitlines()]
    assert code == 0
    assert lines[1] == ["planned", "actual"]
    assert [line[0] for line in lines[2:]] == ["shards", "frames", "bytes", "objects", "hours", "actor-hours"]
    assert [line[-1] for line in lines[2:6]][::3] == ["+0.0%", "+0.0%"]
    assert lines[6][2:] == ["not", "recorded"]
    fields = dict.fromkeys(("wall_seconds", "actor_seconds"), 7.2)
    record = {"fingerprint": job.document.spec.fingerprint(), "started": "2026-01-01T00:00:00+00:00", "num_retries": 0}
    save_run(job.store(), RunRecord(**record, **fields, num_shards=len(job.plan)))
    code, text, _ = command("status", str(tmp_path / "labels"), "--json")
    assert (code, json.loads(text)["actual"]["wall_hours"]) == (0, pytest.approx(0.002))


def test_a_plan_of_other_settings(corpus: Path, tmp_path: Path) -> None:
    """Is neither compared nor put beside a run that was begun."""
    job, other = (
        job_of(corpus, tmp_path / "labels"),
        job_of(corpus, tmp_path / "labels", selection={"policy": "top_k", "k": 2}),
    )
    plan = plan_of(other, 1)
    save_plan(other.store(), plan)
    labelled(job)
    assert "planned" not in command("status", str(tmp_path / "labels"))[1]
    with pytest.raises(InputError, match="was begun with other settings"):
        save_plan(other.store(), plan)


def test_a_run_without_a_plan_leaves_no_record(corpus: Path, tmp_path: Path) -> None:
    job = job_of(corpus, tmp_path / "labels")
    labelled(job)
    record = RunRecord(
        fingerprint=job.document.spec.fingerprint(),
        started="2026-01-01T00:00:00+00:00",
        wall_seconds=1.0,
        actor_seconds=1.0,
        num_shards=1,
        num_retries=0,
    )
    save_run(job.store(), record)
    assert not (tmp_path / "labels" / "runs").exists()
