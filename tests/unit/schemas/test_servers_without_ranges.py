"""HTTP servers that answer a request for a range with the whole object, as Python's own does."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from softlabel_schemas import InputError, load_corpus, object_store, open_dataset, parquet_shard
from softlabel_schemas.cli import main
from softlabel_schemas.object_store import ObjectStore
from tests.support.datasets import Written, random_rows, write_dataset
from tests.support.foreign_corpora import TEXTS, make_recordings
from tests.support.http_server import serving
from tests.support.indices import ids_by_block
from tests.support.targets import assert_same_targets

pytest.importorskip("aiohttp", reason="needs aiohttp")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path) as url:
        yield url


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """A dataset whose shard has several blocks."""
    monkeypatch.setattr(parquet_shard, "FRAMES_PER_GROUP", 600)
    return write_dataset(str(tmp_path / "labels"), shard_format="parquet", num_shards=1, rows=random_rows(4, 200))


def softlabels(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_a_range_is_cut_out(tmp_path: Path, server: str) -> None:
    data = bytes(range(100))
    (tmp_path / "a").write_bytes(data)
    store = ObjectStore(server)
    for start, stop in ((0, 1), (0, 100), (20, 60), (99, 100), (50, 50)):
        assert store.read_range("a", start, stop) == data[start:stop]
    assert store.read("a") == store.read("a", max_bytes=100) == data


def test_utterances(written: Written, server: str) -> None:
    local, dataset = open_dataset(written.url), open_dataset(f"{server}/labels")
    blocks = list(ids_by_block(local).values())
    assert len(blocks) > 2
    for ids in blocks:
        assert_same_targets(dataset[ids[-1]].targets, local[ids[-1]].targets)
    assert softlabels("verify", f"{server}/labels").exit_code == 0


@pytest.mark.parametrize("is_large", [False, True])
def test_audio_in_archives(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, is_large: bool) -> None:
    # So that an archive takes several reads.
    monkeypatch.setattr("softlabel_schemas.tar_corpus._BUFFER_BYTES", 512)
    recordings = make_recordings(tmp_path)
    with tarfile.open(tmp_path / "web.tar", "w") as archive:
        for each in TEXTS:
            archive.add(recordings.audio(each), f"{each}.flac")
    size = (tmp_path / "web.tar").stat().st_size
    monkeypatch.setattr(object_store, "_PIECE_BYTES", size - is_large)
    manifest = tmp_path / "corpus.parquet"
    result = softlabels("import", "webdataset", f"train={server}/web.tar", "--output", str(manifest))
    if is_large:
        message = (
            f"error: {server}/web.tar: 512 bytes at 0 were asked for, the server sent all {size}: it knows no range"
        )
        assert (result.exit_code, message in result.stderr, manifest.exists()) == (2, True, False)
    else:
        assert result.exit_code == 0, result.output
        recordings.check_audio(load_corpus(manifest))


def test_a_large_object_is_refused(
    tmp_path: Path, written: Written, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    monkeypatch.setattr(object_store, "_PIECE_BYTES", 99)
    store = ObjectStore(server)
    message = f"{server}/a: 10 bytes at 20 were asked for, the server sent all 100: it knows no range requests; copy"
    with pytest.raises(InputError, match=message):
        store.read_range("a", 20, 30)
    # What is read as a whole needs no ranges.
    assert store.read("a") == bytes(range(100))
    dataset, ids = open_dataset(f"{server}/labels"), next(iter(ids_by_block(open_dataset(written.url)).values()))
    with pytest.raises(InputError, match=r"shards/000000-.*it knows no range requests"):
        dataset[ids[0]]
