"""``softlabels``: what it prints and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from softlabel_schemas.cli import main
from tests.support.datasets import Written, write_dataset


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_dataset(str(tmp_path_factory.mktemp("cli") / "labels"), shard_format="parquet")


def softlabels(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_describe_prints_a_line_for_each_fact(written: Written) -> None:
    result = softlabels("describe", written.url)
    assert (result.exit_code, result.stderr) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert facts["fingerprint"] == written.manifest.fingerprint
    assert facts["content_digest"] == written.manifest.content_digest
    assert facts["utterances"] == "8"
    assert facts["skipped"] == "1"
    assert facts["bytes"] == f"{written.manifest.num_bytes:,}"
    assert facts["teachers"] == '["tdnn (1, dddddddddddd)"]'
    assert json.loads(facts["selection"]) == {"policy": "top_k", "k": 8, "keep_hard_label": False}


def test_describe_as_json(written: Written) -> None:
    result = softlabels("describe", written.url, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    manifest = written.manifest
    expected = {
        "fingerprint": manifest.fingerprint,
        "content_digest": manifest.content_digest,
        "utterances": manifest.num_utterances,
        "frames": manifest.num_frames,
        "entries": manifest.num_entries,
        "bytes": manifest.num_bytes,
        "shards": 3,
        "codec": "packed-u8",
        "temperatures": [1.0, 2.0, 4.0],
    }
    assert {name: facts[name] for name in expected} == expected


def test_verify_says_what_it_checked(written: Written) -> None:
    result = softlabels("verify", written.url)
    assert result.exit_code == 0
    manifest = written.manifest
    assert result.stdout == (
        f"{written.url}: 8 utterances, {manifest.num_frames} frames in 3 shards, all as written; "
        f"content digest {manifest.content_digest}\n"
    )
    assert "verify: 3/3 shards" in result.stderr


@pytest.mark.parametrize("command", ["describe", "verify"])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing/here", "nothing/here is not a published dataset (manifest.json does not exist); check the URL"),
        ("a-file", "a-file is not a published dataset (manifest.json does not exist); check the URL"),
        ("nowhere://labels", "cannot use the URL nowhere://labels: "),
        ("http://", "a URL is malformed between :// and the path; expected a host or a bucket there"),
        ("a\0b", "cannot use the URL 'a\\x00b/manifest.json': it has a NUL character"),
    ],
)
def test_a_bad_url_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, url: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    result = softlabels(command, url)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        *(["verify"], ["gc"], ["describe", "a", "--yaml"], ["unknown"]),
        # Neither below a range nor above it.
        ["diff", "a", "b", "--fraction", "nan"],
        ["import", "table", "a", "--output", "b", "--frame-shift-ms", "nan"],
    ],
)
def test_bad_usage_exits_with_2(args: list[str]) -> None:
    result = softlabels(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_verify_counts_problems(tmp_path: Path, num_damaged: int) -> None:
    damaged = write_dataset(str(tmp_path / "labels"), shard_format="parquet")
    for record in damaged.manifest.shards[:num_damaged]:
        (tmp_path / "labels" / record.folder / "shard.parquet").write_bytes(b"")
    result = softlabels("verify", damaged.url)
    assert result.exit_code == 1
    what = "1 problem" if num_damaged == 1 else "2 problems"
    assert f"error: {what} in {damaged.url}:\n  shard 0: " in result.stderr


@pytest.mark.parametrize("args", [[], *([name] for name in main.commands)])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_an_example(args: list[str], flag: str) -> None:
    result = softlabels(*args, flag)
    assert result.exit_code == 0
    _, _, examples = result.stdout.partition("Example")
    assert f"\n    softlabels {' '.join(args)}" in examples


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, written: Written) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("softlabel_schemas.cli.verify", interrupt)
    result = softlabels("verify", written.url)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
