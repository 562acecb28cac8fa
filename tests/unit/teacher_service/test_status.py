"""Where a run stands, at each stage of one, and how the command says it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from softlabel_schemas import InputError
from softlabel_schemas.commit import begin, publish
from softlabel_schemas.names import tag, wanted_address
from softlabel_schemas.object_store import ObjectStore
from teacher_service.cli import main
from teacher_service.status import ranges, read_status
from tests.support.datasets import INVENTORY, commit_rows, cut_evenly, make_document, random_rows

ROWS = random_rows(num_rows=8)
DOCUMENT = make_document(8, shard_format="parquet", codec="packed-u8", num_shards=4)
FINGERPRINT = DOCUMENT.spec.fingerprint()


def commit(url: Path, shards: dict[int, float], *, begun: float = 300.0) -> ObjectStore:
    """A run that was begun so many seconds ago, with these shards, each committed so many seconds ago."""
    store = ObjectStore(url)
    begin(store, DOCUMENT, INVENTORY)
    ranges_of_shards, now = cut_evenly(8, 4), time.time()
    os.utime(url / "spec.json", (now - begun, now - begun))
    for index, seconds_ago in shards.items():
        commit_rows(store, DOCUMENT, ranges_of_shards[index], ROWS)
        os.utime(url / f"commits/{index:06d}.json", (now - seconds_ago, now - seconds_ago))
    return store


def command(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["status", *args])
    return result.exit_code, result.output


def test_begun(tmp_path: Path) -> None:
    commit(tmp_path / "labels", {})
    status = read_status(str(tmp_path / "labels"))
    assert (status.num_shards, status.missing, status.published) == (4, (0, 1, 2, 3), False)
    assert (status.shards_per_minute, status.minutes_left, status.seconds_since_last_commit) == (None, None, None)
    code, text = command(str(tmp_path / "labels"))
    assert code == 0
    assert text == (
        f"{tmp_path}/labels: 0 of 4 shards committed, not published yet; fingerprint {FINGERPRINT}\n"
        "missing: shards 0-3\n"
    )


def test_running(tmp_path: Path) -> None:
    """Three shards in the two minutes that ended 90 s ago: one a minute."""
    commit(tmp_path / "labels", {0: 210.0, 1: 140.0, 3: 90.0})
    status = read_status(str(tmp_path / "labels"))
    assert status.missing == (2,)
    assert status.shards_per_minute == pytest.approx(1.0)
    assert status.minutes_left == pytest.approx(1.0)
    assert status.seconds_since_last_commit == pytest.approx(90, abs=30)
    code, text = command(str(tmp_path / "labels"))
    assert code == 0
    lines = text.splitlines()
    assert lines[0].startswith(f"{tmp_path}/labels: 3 of 4 shards committed, not published yet")
    assert lines[1] == "rate of the last commits: 1.00 shards/min, 1 min left"
    assert lines[2].startswith("last commit ")
    assert lines[3:] == ["missing: shards 2"]
    code, text = command(str(tmp_path / "labels"), "--json")
    fields = json.loads(text)
    assert code == 0
    assert (fields["missing"], fields["published"], fields["fingerprint"]) == ([2], False, FINGERPRINT)
    assert fields["shards_per_minute"] == pytest.approx(1.0)
    assert fields["minutes_left"] == pytest.approx(1.0)


NIGHT = 12 * 3600.0


@pytest.mark.parametrize(
    ("begun", "commits", "shards_per_minute"),
    [
        # Stopped overnight: once, twice, and with no second commit since.
        (NIGHT + 500, (NIGHT, 120, 60), 1.0),
        (2 * NIGHT + 500, (2 * NIGHT, NIGHT, 120, 60), 1.0),
        (NIGHT + 500, (NIGHT + 60, NIGHT, 60), None),
        (NIGHT + 500, (NIGHT, 60), None),
        # Resumed on one slow machine, after a fast one.
        (NIGHT + 100, (NIGHT, 7200, 3600, 0), 1 / 60),
        # Two actors that began together.
        (1500, (800, 799, 101, 100), 3 / (700 / 60)),
        # Copied: it seems to be begun after its first commits.
        (50, (NIGHT, 60), 1 / ((NIGHT - 60) / 60)),
    ],
)
def test_a_pause_does_not_count_in_the_rate(
    tmp_path: Path, begun: float, commits: tuple[float, ...], shards_per_minute: float | None
) -> None:
    commit(tmp_path / "labels", dict(enumerate(commits)), begun=begun)
    expected = None if shards_per_minute is None else pytest.approx(shards_per_minute, rel=1e-3)
    assert read_status(str(tmp_path / "labels")).shards_per_minute == expected


def test_all_committed_but_not_published(tmp_path: Path) -> None:
    commit(tmp_path / "labels", dict.fromkeys(range(4), 5.0))
    code, text = command(str(tmp_path / "labels"))
    assert (code, text) == (
        0,
        f"{tmp_path}/labels: 4 of 4 shards committed, not published yet; fingerprint {FINGERPRINT}\n",
    )


def test_published(tmp_path: Path) -> None:
    publish(commit(tmp_path / "labels", dict.fromkeys(range(4), 5.0)), DOCUMENT)
    code, text = command(str(tmp_path / "labels"))
    assert (code, text) == (0, f"{tmp_path}/labels: 4 of 4 shards committed, published; fingerprint {FINGERPRINT}\n")
    code, text = command(str(tmp_path / "labels"), "--json")
    assert (code, json.loads(text)["published"], json.loads(text)["missing"]) == (0, True, [])


def test_by_name(tmp_path: Path) -> None:
    publish(commit(tmp_path / "labels", dict.fromkeys(range(4), 5.0)), DOCUMENT)
    tag(str(tmp_path / "labels"), wanted_address(f"{tmp_path}#english"))
    commit(tmp_path / "labels#2", {1: 0.0})
    assert not read_status(str(tmp_path / "labels#2")).published
    found = read_status(f"{tmp_path}#english")
    assert (found.url, found.published) == (str(tmp_path / "labels"), True)


def test_other_files_beside_the_commits_do_not_count(tmp_path: Path) -> None:
    commit(tmp_path / "labels", {1: 0.0})
    for name in ("000002.json.tmp-3f2a", "notes.txt", "7.json"):
        (tmp_path / "labels/commits" / name).touch()
    assert read_status(str(tmp_path / "labels")).missing == (0, 2, 3)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no soft-label run: spec\.json does not exist"):
        read_status(str(tmp_path))
    code, text = command(str(tmp_path))
    assert (code, text) == (2, f"error: {tmp_path} holds no soft-label run: spec.json does not exist\n")


@pytest.mark.parametrize(
    ("indices", "text"),
    [((), ""), ((3,), "3"), ((0, 1, 2, 5), "0-2, 5"), ((0, 2, 3, 9, 10), "0, 2-3, 9-10")],
)
def test_ranges(indices: tuple[int, ...], text: str) -> None:
    assert ranges(indices) == text
