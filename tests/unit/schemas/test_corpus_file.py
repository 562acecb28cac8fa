"""A corpus manifest read in bounded memory: what it tells of a corpus, its rows, and a file that changes meanwhile."""

from __future__ import annotations

import copy
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import ClassInventory, Corpus, InputError, Utterance, load_corpus, unique_ids, write_corpus
from softlabel_schemas.corpus_blocks import ManifestFile
from softlabel_schemas.corpus_file import CorpusFile, CorpusScan
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import plan_shards
from softlabel_schemas.unique_ids import UniqueIds
from tests.support.manifests import write_large_manifest
from tests.support.memory import in_own_process

INVENTORY = ClassInventory(names=tuple(f"senone-{index}" for index in range(50)))
SPLITS = (None, ("train",), ("dev", "test"), ("test",))


def utterances(num_rows: int, *, seed: int = 0, num_labels: int = 20) -> list[Utterance]:
    """Every kind of row: null and empty hard labels, with and without sha256, ids of one to four bytes a character. The last
    fifth is of split test, the rest alternates."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(num_rows):
        labels = rng.integers(-1, 50, rng.integers(0, num_labels)).astype(np.int32)
        found.append(
            Utterance(
                utterance_id=f"{'aü€😀'[index % 4]}-{index}",
                audio=f"{index}.wav" if index % 3 else None,
                features=f"{index}.npy" if index % 3 == 0 or index % 5 == 0 else None,
                sha256=f"{index:064x}" if index % 2 else None,
                sample_rate=(8_000, 16_000)[index % 7 == 0],
                num_samples=int(rng.integers(1, 400_000)),
                text=None if index % 6 else "text",
                split="test" if index >= num_rows * 4 // 5 else ("train", "dev")[index % 2],
                hard_labels=labels if index % 9 else None,
            )
        )
    return found


def write(path: Path, rows: list[Utterance], *, rows_per_group: int | None = None, **kwargs: Any) -> Path:
    write_corpus(path, rows, inventory=INVENTORY, hard_label_frame_shift_ms=10.0)
    if rows_per_group is not None:
        pq.write_table(pq.read_table(path), path, row_group_size=rows_per_group, **kwargs)
    return path


def chosen(path: Path, splits: tuple[str, ...] | None) -> Corpus:
    corpus = load_corpus(path)
    return corpus if splits is None else corpus.select_splits(splits)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of about 7 rows, so that row groups have several."""
    monkeypatch.setattr("softlabel_schemas.corpus_blocks._LABELS_PER_BLOCK", 64)


def check_scan(scan: CorpusScan, corpus: Corpus, shard_seconds: float) -> None:
    labels = np.concatenate([row.hard_labels for row in corpus if row.hard_labels is not None])
    assert scan.digest == corpus.digest
    assert scan.num_rows == len(corpus) == sum(block.num_rows for block in scan.blocks)
    assert scan.hard_label_frame_shift_ms == 10.0
    assert scan.inventory_digest == INVENTORY.digest()
    assert scan.label_range == (labels.min(), labels.max())
    assert scan.plan == plan_shards(corpus.seconds(), shard_seconds)
    assert sum(scan.seconds_of_shard) == pytest.approx(corpus.seconds().sum())


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("rows_per_group", [None, 1, 13, 100])
@pytest.mark.usefixtures("small_blocks")
def test_scan_and_read_agree_with_the_corpus_in_memory(
    tmp_path: Path, rows_per_group: int | None, splits: tuple[str, ...] | None
) -> None:
    path = write(tmp_path / "c.parquet", utterances(60), rows_per_group=rows_per_group)
    corpus, file = chosen(path, splits), CorpusFile(path, splits)
    scan = file.scan(100.0)
    check_scan(scan, corpus, 100.0)
    assert len(scan.blocks) >= 8
    # As an actor has it.
    file = copy.deepcopy(file)
    for shard in scan.plan:
        rows = file.read(shard.first_row, shard.num_rows)
        assert rows.table.equals(corpus.table.slice(shard.first_row, shard.num_rows))
        assert (rows.hard_label_frame_shift_ms, rows.inventory_digest) == (10.0, INVENTORY.digest())
        assert rows.resolve("a.wav") == (str(tmp_path), "a.wav")
    assert file.read(0, len(corpus)).digest == corpus.digest
    assert [row.utterance_id for row in file.read(len(corpus) - 1, 1)] == [corpus[len(corpus) - 1].utterance_id]


def test_several_row_groups_of_the_usual_size(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", utterances(9_000, num_labels=3))
    file = CorpusFile(path, ["dev", "test"])
    scan = file.scan(1000.0)
    check_scan(scan, chosen(path, ("dev", "test")), 1000.0)
    assert [block.row_group for block in scan.blocks] == [0, 1, 2]
    assert file.read(1_500, 3_000).table.equals(chosen(path, ("dev", "test")).table.slice(1_500, 3_000))


def test_types_that_arrow_converts(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", utterances(30))
    table = pq.read_table(path)
    for name, type_ in {
        "utterance_id": pa.large_string(),
        "sample_rate": pa.int64(),
        "split": pa.large_string(),
    }.items():
        position = table.schema.get_field_index(name)
        table = table.set_column(position, name, table[name].cast(type_))
    pq.write_table(table, path, row_group_size=10, use_dictionary=False, compression="gzip")
    assert CorpusFile(path).scan(60.0).digest == load_corpus(path).digest


def test_a_corpus_without_hard_labels(tmp_path: Path) -> None:
    rows = [replace(row, hard_labels=None) for row in utterances(10)]
    write_corpus(tmp_path / "c.parquet", rows)
    scan = CorpusFile(tmp_path / "c.parquet").scan(60.0)
    assert scan.digest == load_corpus(tmp_path / "c.parquet").digest
    assert (scan.label_range, scan.hard_label_frame_shift_ms, scan.inventory_digest) == (None, None, None)


def test_in_memory(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/c.parquet"
    write_corpus(url, utterances(10), inventory=INVENTORY, hard_label_frame_shift_ms=10.0)
    assert CorpusFile(url).scan(60.0).digest == load_corpus(url).digest


def test_an_unknown_split(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", utterances(10))
    with pytest.raises(InputError, match="the corpus has no split eval; it has dev, test, train"):
        CorpusFile(path, ["train", "eval"]).scan(60.0)


def test_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", utterances(10))
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(InputError, match=r"c.parquet: a corpus needs at least one utterance"):
        CorpusFile(path).scan(60.0)


# Ids


@pytest.fixture
def weak_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last byte alone: ten different hashes."""

    def last_byte(_: unique_ids._Hash, ids: pa.ChunkedArray) -> np.ndarray:
        return np.array([ord(value[-1]) for value in ids.to_pylist()], dtype=np.uint64)

    monkeypatch.setattr(unique_ids._Hash, "__call__", last_byte)


def repeat_an_id(path: Path, first: int, second: int) -> str:
    """Past the check of ``write_corpus``."""
    table = pq.read_table(path)
    ids = table["utterance_id"].to_pylist()
    ids[second] = ids[first]
    pq.write_table(table.set_column(0, table.schema.field(0), pa.array(ids)), path, row_group_size=100)
    return str(ids[first])


@pytest.mark.parametrize("ids_per_run", [1, 143, 1000])
def test_a_repeated_id_in_another_row_group(tmp_path: Path, ids_per_run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unique_ids, "_IDS_PER_RUN", ids_per_run)
    path = write(tmp_path / "c.parquet", utterances(1000))
    repeated = repeat_an_id(path, 17, 981)
    # In rows that are not chosen too, as for load_corpus.
    for splits in (None, ("train",)):
        with pytest.raises(InputError, match=f"c.parquet: utterance_id '{repeated}' occurs 2 times"):
            CorpusFile(path, splits).scan(60.0)


@pytest.mark.usefixtures("weak_hashes")
def test_equal_hashes_of_different_ids_are_no_repetition(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", utterances(300))
    CorpusFile(path).scan(60.0)
    repeated = repeat_an_id(path, 3, 257)
    with pytest.raises(InputError, match=f"utterance_id '{repeated}' occurs 2 times"):
        CorpusFile(path).scan(60.0)


@given(
    columns=st.lists(st.lists(st.text(alphabet="ab\0é", max_size=4), max_size=6), max_size=6),
    ids_per_run=st.integers(1, 9),
)
def test_repeated_ids_are_those_that_counting_finds(columns: list[list[str]], ids_per_run: int) -> None:
    """Ids that differ by zero bytes at the end alone, and the empty id, among them."""
    chunks = [pa.chunked_array([column], pa.string()) for column in columns]
    counts = Counter(value for column in columns for value in column)
    with pytest.MonkeyPatch.context() as patch, UniqueIds() as ids:
        patch.setattr(unique_ids, "_IDS_PER_RUN", ids_per_run)
        for chunk in chunks:
            ids.add(chunk)
        found = ids.first_repeated(chunks)
    assert found == next(((value, count) for value, count in counts.items() if count > 1), None)


# A file that is another one than at the scan


def other_labels(path: Path) -> None:
    rows = utterances(60)
    rows[34] = replace(rows[34], hard_labels=np.zeros(5, dtype=np.int32))
    write(path, rows, rows_per_group=13)


def other_location(path: Path) -> None:
    rows = utterances(60)
    rows[28] = replace(rows[28], audio="elsewhere.wav")
    write(path, rows, rows_per_group=13)


def other_split(path: Path) -> None:
    rows = utterances(60)
    rows[32] = replace(rows[32], split="dev")
    write(path, rows, rows_per_group=13)


def fewer_rows(path: Path) -> None:
    write(path, utterances(60)[:30], rows_per_group=13)


def other_row_groups(path: Path) -> None:
    write(path, utterances(60), rows_per_group=20)


def other_frame_shift(path: Path) -> None:
    write_corpus(path, utterances(60), inventory=INVENTORY, hard_label_frame_shift_ms=30.0)


CHANGES = (other_labels, other_location, other_split, fewer_rows, other_row_groups, other_frame_shift)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.usefixtures("small_blocks")
def test_a_file_that_changed(tmp_path: Path, change: Any) -> None:
    path = write(tmp_path / "c.parquet", utterances(60), rows_per_group=13)
    file = CorpusFile(path, ["train"])
    scan = file.scan(100.0)
    change(path)
    with pytest.raises(InputError, match=r"c.parquet changed while the job was running; give back the file"):
        file.read(0, scan.num_rows)


def test_rows_that_did_not_change_can_be_read(tmp_path: Path) -> None:
    """The check is of what is read, so that it costs nothing."""
    path = write(tmp_path / "c.parquet", utterances(60), rows_per_group=13)
    file = CorpusFile(path)
    file.scan(100.0)
    other_labels(path)
    assert len(file.read(0, 26)) == 26
    with pytest.raises(InputError, match="changed while the job was running"):
        file.read(25, 2)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", utterances(10))
    file = CorpusFile(path)
    file.scan(100.0)
    path.unlink()
    with pytest.raises(InputError, match=r"corpus manifest .*/c.parquet does not exist"):
        file.read(0, 1)


# Storage and memory


def test_an_error_of_the_storage_is_not_one_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is tried again."""
    path = write(tmp_path / "c.parquet", utterances(60), rows_per_group=13)
    read_range, left = ObjectStore.read_range, 3

    def failing(store: ObjectStore, key: str, start: int, stop: int) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionResetError("the connection was reset")
        return read_range(store, key, start, stop)

    monkeypatch.setattr(ObjectStore, "read_range", failing)
    with pytest.raises(ConnectionResetError, match="the connection was reset"):
        CorpusFile(path).scan(60.0)


@pytest.mark.parametrize("fetch", [0, 64 << 20])
def test_a_row_group_is_one_request_unless_it_is_large(
    tmp_path: Path, fetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.parquet", utterances(2_000), rows_per_group=1_000)
    monkeypatch.setattr("softlabel_schemas.corpus_blocks._MAX_FETCH_BYTES", fetch)
    file, requests = ManifestFile(str(path), {}), []
    read_range = ObjectStore.read_range
    monkeypatch.setattr(ObjectStore, "read_range", lambda *call: requests.append(call) or read_range(*call))
    assert sum(len(table) for table in file.blocks(1)) == 1_000
    if fetch:
        assert len(requests) == 1
        assert sum(len(table) for table in file.blocks(0, ["split", "hard_labels"])) == 1_000
        assert len(requests) == 2
        assert requests[1][3] - requests[1][2] < path.stat().st_size // 4
    else:
        assert len(requests) >= 10


@pytest.mark.parametrize("rows_per_group", [4_096, 100_000])
def test_memory_does_not_grow_with_rows(tmp_path: Path, rows_per_group: int) -> None:
    """Peak of Python's and of Arrow's own allocations, with labels of 4 kB each; also for one huge row group."""
    peaks = []
    for num_rows in (8_192, 32_768):
        path = write_large_manifest(
            tmp_path / f"{num_rows}.parquet", num_rows, INVENTORY, rows_per_group=rows_per_group
        )
        peaks.append(in_own_process(peak_of_scan, path))
    # 131 MB of labels in the larger file; a block has 16 MB, a few times while it is decoded and hashed. How many of these
    # fall together is up to the threads: the peaks may differ by a block.
    assert peaks[1] < peaks[0] + 20e6
    assert peaks[1] < 120e6


def peak_of_scan(path: Path) -> float:
    """Bytes, over what is there before; for a process of its own."""
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    file = CorpusFile(path)
    scan = file.scan(1000.0)
    file.read(scan.num_rows - 100, 100)
    return float(tracemalloc.get_traced_memory()[1] + pool.max_memory())
