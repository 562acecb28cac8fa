"""The corpus manifest: round trip, digest, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel_schemas import ClassInventory, Corpus, InputError, Utterance, load_corpus, write_corpus
from softlabel_schemas.corpus import check_hard_labels, split_url
from softlabel_schemas.corpus_file import CorpusFile

INVENTORY = ClassInventory(names=("sil", "a", "b"))

UTTERANCES = (
    Utterance(
        utterance_id="first-ü",
        audio="first.wav",
        sha256="a" * 64,
        sample_rate=16_000,
        num_samples=24_000,
        text="guten Tag",
        speaker="anna",
        split="train",
        hard_labels=np.array([0, 1, -1, 2], dtype=np.int32),
    ),
    Utterance(utterance_id="second", features="second.npy", sample_rate=8_000, num_samples=4_000, split="dev"),
    Utterance(
        utterance_id="third",
        audio="third.wav",
        sample_rate=16_000,
        num_samples=16_000,
        split="train",
        hard_labels=np.array([], dtype=np.int32),
    ),
)


@pytest.fixture(params=["load_corpus", "CorpusFile"])
def load(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    """Both readers of a manifest check it alike."""
    return load_corpus if request.param == "load_corpus" else lambda path: CorpusFile(path).scan(60.0)


def write_and_load(path: Path, utterances: tuple[Utterance, ...] = UTTERANCES, **kwargs: Any) -> Corpus:
    write_corpus(path, utterances, **{"inventory": INVENTORY, "hard_label_frame_shift_ms": 10.0} | kwargs)
    return load_corpus(path)


def assert_same_utterance(found: Utterance, expected: Utterance) -> None:
    assert replace(found, hard_labels=None) == replace(expected, hard_labels=None)
    assert (found.hard_labels is None) == (expected.hard_labels is None)
    if expected.hard_labels is not None:
        np.testing.assert_array_equal(found.hard_labels, expected.hard_labels, strict=True)


class TestManifest:
    @pytest.mark.parametrize("base", ["local", "memory"])
    def test_load_undoes_write(self, tmp_path: Path, base: str) -> None:
        folder = str(tmp_path) if base == "local" else f"memory://{tmp_path.name}"
        corpus = write_and_load(f"{folder}/corpus.parquet")
        assert len(corpus) == 3
        for found, expected in zip(corpus, UTTERANCES, strict=True):
            assert_same_utterance(found, expected)
        assert_same_utterance(corpus[1], UTTERANCES[1])
        assert corpus.hard_label_frame_shift_ms == 10.0
        assert corpus.inventory_digest == INVENTORY.digest()
        np.testing.assert_array_equal(corpus.seconds(), [1.5, 0.5, 1.0])
        assert corpus[0].seconds == 1.5
        assert corpus.resolve("a/b.wav") == (f"{folder}/a", "b.wav")

    def test_a_corpus_without_hard_labels(self, tmp_path: Path) -> None:
        corpus = write_and_load(tmp_path / "c.parquet", UTTERANCES[1:2], inventory=None)
        assert corpus.inventory_digest is None
        assert corpus.hard_label_frame_shift_ms is None
        assert corpus[0].hard_labels is None
        check_hard_labels(corpus, INVENTORY, where="corpus")

    def test_a_bare_file_name_is_in_the_working_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_and_load(Path("c.parquet"))
        assert load_corpus("c.parquet").resolve("a.wav") == (".", "a.wav")

    @pytest.mark.parametrize("location", ["/data/a.wav", "s3://bucket/a.wav"])
    def test_absolute_locations_stay(self, tmp_path: Path, location: str) -> None:
        corpus = write_and_load(tmp_path / "c.parquet")
        assert "/".join(corpus.resolve(location)) == location

    @pytest.mark.parametrize(
        ("url", "folder", "name"),
        [
            ("c.parquet", ".", "c.parquet"),
            ("a/c.parquet", "a", "c.parquet"),
            ("/c.parquet", "/", "c.parquet"),
            ("memory://c.parquet", "memory://", "c.parquet"),
            ("memory:///c.parquet", "memory://", "c.parquet"),
            ("memory://a/c.parquet", "memory://a", "c.parquet"),
            ("s3://bucket/c.parquet", "s3://bucket", "c.parquet"),
        ],
    )
    def test_folder_and_name(self, url: str, folder: str, name: str) -> None:
        assert split_url(url) == (folder, name)

    @pytest.mark.parametrize(
        ("location", "message"),
        [
            ("https://host/a.wav?sv=2024&sig=planted", "the https:// URL holds a credential"),
            ("https://planted@host", "the https:// URL holds a credential"),
            ("zip://a.wav::https://host/a.zip?X-Amz-Signature=planted", "the https:// URL holds a credential"),
            ("https://planted@[host/a.wav", "a URL is malformed between :// and the path"),
        ],
    )
    def test_a_location_with_a_credential(self, tmp_path: Path, location: str, message: str) -> None:
        corpus = write_and_load(tmp_path / "c.parquet")
        for use in (corpus.resolve, split_url, load_corpus):
            with pytest.raises(InputError, match=message) as caught:
                use(location)
            assert "planted" not in str(caught.value)

    def test_row_groups(self, tmp_path: Path) -> None:
        """A reader holds one at a time."""
        utterances = tuple(replace(UTTERANCES[1], utterance_id=str(index)) for index in range(4097))
        write_and_load(tmp_path / "c.parquet", utterances)
        metadata = pq.ParquetFile(tmp_path / "c.parquet").metadata
        assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [4096, 1]

    def test_splits(self, tmp_path: Path) -> None:
        corpus = write_and_load(tmp_path / "c.parquet")
        chosen = corpus.select_splits(["train"])
        assert [utterance.utterance_id for utterance in chosen] == ["first-ü", "third"]
        assert chosen.inventory_digest == corpus.inventory_digest
        assert chosen.digest != corpus.digest
        assert len(corpus.select_splits(["dev", "train"])) == 3
        with pytest.raises(InputError, match="the corpus has no split eval, test; it has dev, train"):
            corpus.select_splits(["train", "test", "eval"])

    @pytest.mark.parametrize(
        ("row", "changes", "message"),
        [
            (1, {"utterance_id": "first-ü"}, "utterance_id 'first-ü' occurs 2 times"),
            (1, {"utterance_id": ""}, r"row 1 \(utterance_id ''\): utterance_id is empty"),
            (2, {"audio": None}, r"row 2 \(utterance_id 'third'\): neither audio nor features is given"),
            (0, {"sample_rate": 0}, r"row 0 \(utterance_id 'first-ü'\): sample_rate is not positive"),
            (1, {"num_samples": 0}, r"row 1 \(utterance_id 'second'\): num_samples is not positive"),
        ],
    )
    def test_a_bad_row_is_named_by_writer_and_reader(
        self,
        tmp_path: Path,
        load: Callable[[Path], object],
        row: int,
        changes: dict[str, Any],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = tmp_path / "c.parquet"
        utterances = list(UTTERANCES)
        utterances[row] = replace(utterances[row], **changes)
        with pytest.raises(InputError, match=f"c.parquet: {message}"):
            write_and_load(path, tuple(utterances))
        assert not path.exists()
        with monkeypatch.context() as patched:
            patched.setattr("softlabel_schemas.corpus._check", lambda *_: None)
            write_and_load(path, tuple(utterances))
        with pytest.raises(InputError, match=f"c.parquet: {message}"):
            load(path)

    def test_an_empty_corpus(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="a corpus needs at least one utterance"):
            write_corpus(tmp_path / "c.parquet", [])

    @pytest.mark.parametrize("left_out", ["inventory", "hard_label_frame_shift_ms"])
    def test_hard_labels_need_their_inventory_and_frame_shift(self, tmp_path: Path, left_out: str) -> None:
        with pytest.raises(InputError, match="give the inventory and hard_label_frame_shift_ms too"):
            write_and_load(tmp_path / "c.parquet", **{left_out: None})

    def test_a_missing_file(self, tmp_path: Path, load: Callable[[Path], object]) -> None:
        with pytest.raises(InputError, match=r"corpus manifest .*/c.parquet does not exist$"):
            load(tmp_path / "c.parquet")

    def test_what_is_not_parquet(self, tmp_path: Path, load: Callable[[Path], object]) -> None:
        (tmp_path / "c.parquet").write_bytes(b"id,audio\n")
        with pytest.raises(InputError, match=r"c.parquet is not a readable Parquet file: "):
            load(tmp_path / "c.parquet")

    def test_a_flipped_bit(self, tmp_path: Path, load: Callable[[Path], object]) -> None:
        path = tmp_path / "c.parquet"
        write_and_load(path)
        data = bytearray(path.read_bytes())
        data[len(data) // 4] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"c.parquet is not a readable Parquet file: "):
            load(path)

    def test_another_parquet_file(self, tmp_path: Path, load: Callable[[Path], object]) -> None:
        pq.write_table(pa.table({"id": ["a"]}), tmp_path / "c.parquet")
        with pytest.raises(InputError, match=r"is not a corpus manifest: columns \['id'\], expected"):
            load(tmp_path / "c.parquet")

    @pytest.mark.parametrize(
        ("column", "values"),
        [
            ("sample_rate", pa.array(["16k", "16k", "16k"])),
            ("split", pa.array(["train", None, "dev"])),
            # As nothing but a broken writer would have it.
            ("text", pa.array([b"a", b"\xff", b"b"]).view(pa.string())),
            ("utterance_id", pa.array([b"a", b"\xff", b"b"]).view(pa.string())),
        ],
    )
    def test_a_column_of_another_type(
        self, tmp_path: Path, load: Callable[[Path], object], column: str, values: pa.Array
    ) -> None:
        path = tmp_path / "c.parquet"
        write_and_load(path)
        table = pq.read_table(path)
        pq.write_table(table.set_column(table.schema.get_field_index(column), column, values), path)
        with pytest.raises(InputError, match=r"c.parquet is not a corpus manifest: (?!columns)"):
            load(path)


class TestHardLabels:
    @pytest.mark.parametrize("frame_shift", [None, b"0.0", b"nan", b"ten"])
    def test_need_their_metadata(
        self, tmp_path: Path, load: Callable[[Path], object], frame_shift: bytes | None
    ) -> None:
        path = tmp_path / "c.parquet"
        write_and_load(path)
        table = pq.read_table(path)
        metadata = {key: value for key, value in table.schema.metadata.items() if b"frame_shift" not in key}
        if frame_shift is not None:
            metadata[b"softlabels.hard_label_frame_shift_ms"] = frame_shift
        pq.write_table(table.replace_schema_metadata(metadata), path)
        with pytest.raises(InputError, match=r"c.parquet (has hard labels, so|is not a corpus manifest)"):
            load(path)

    def test_a_null_among_them(self, tmp_path: Path, load: Callable[[Path], object]) -> None:
        path = tmp_path / "c.parquet"
        write_and_load(path)
        table = pq.read_table(path)
        labels = pa.array([[0, None], None, None], pa.list_(pa.int32()))
        pq.write_table(table.set_column(table.schema.get_field_index("hard_labels"), "hard_labels", labels), path)
        with pytest.raises(InputError, match="a null among the hard labels; a frame without one has -1"):
            load(path)

    def test_of_another_inventory(self, tmp_path: Path) -> None:
        corpus = write_and_load(tmp_path / "c.parquet")
        other = ClassInventory(names=("sil", "a", "c"))
        with pytest.raises(InputError) as caught:
            check_hard_labels(corpus, other, where="c.parquet")
        assert str(caught.value) == (
            f"c.parquet: hard labels are ids of inventory {INVENTORY.digest()[:12]}, "
            f"but the inventory given is {other.digest()[:12]} with 3 classes"
        )
        check_hard_labels(corpus, INVENTORY, where="c.parquet")

    @pytest.mark.parametrize(("bad", "lowest", "highest"), [(3, 0, 3), (-2, -2, 0)])
    def test_out_of_range(self, tmp_path: Path, bad: int, lowest: int, highest: int) -> None:
        labels = np.array([0, bad], dtype=np.int32)
        corpus = write_and_load(tmp_path / "c.parquet", (replace(UTTERANCES[0], hard_labels=labels),))
        message = rf"c: hard labels run from {lowest} to {highest}, expected -1 \(none\) to 2"
        with pytest.raises(InputError, match=message):
            check_hard_labels(corpus, INVENTORY, where="c")


class TestDigest:
    def test_is_that_of_format_version_1(self, tmp_path: Path) -> None:
        """A changed value would make every published dataset one of another corpus."""
        assert write_and_load(tmp_path / "c.parquet").digest == (
            "8210b8fff2432d5733915c7a77e230dd99994d452cc2536936fde17dcbf0864b"
        )

    def test_is_free_of_locations_texts_and_splits(self, tmp_path: Path) -> None:
        elsewhere = [
            replace(utterance, audio=f"/other/{index}.flac", text="other", speaker="other", split="other")
            for index, utterance in enumerate(UTTERANCES)
        ]
        (tmp_path / "folder").mkdir()
        first = write_and_load(tmp_path / "c.parquet")
        second = write_and_load(tmp_path / "folder" / "d.parquet", tuple(elsewhere))
        assert first.digest == second.digest

    def test_is_free_of_row_groups_and_compression(self, tmp_path: Path) -> None:
        path = tmp_path / "c.parquet"
        digest = write_and_load(path).digest
        pq.write_table(pq.read_table(path), path, row_group_size=1, compression="none")
        assert pq.ParquetFile(path).num_row_groups == 3
        assert load_corpus(path).digest == digest

    def test_a_chosen_split_has_the_digest_of_its_rows(self, tmp_path: Path) -> None:
        chosen = write_and_load(tmp_path / "c.parquet").select_splits(["train"])
        alone = write_and_load(tmp_path / "d.parquet", (UTTERANCES[0], UTTERANCES[2]))
        assert chosen.digest == alone.digest

    @pytest.mark.parametrize(
        ("row", "changes"),
        [
            (0, {"utterance_id": "other"}),
            (0, {"sha256": "b" * 64}),
            (0, {"sha256": None}),
            (0, {"sample_rate": 8_000}),
            (0, {"num_samples": 24_001}),
            (0, {"hard_labels": np.array([0, 1, -1, 1], dtype=np.int32)}),
            (0, {"hard_labels": np.array([0, 1, -1], dtype=np.int32)}),
            (2, {"hard_labels": None}),
        ],
    )
    def test_depends_on_what_decides_the_labels(self, tmp_path: Path, row: int, changes: dict[str, Any]) -> None:
        utterances = list(UTTERANCES)
        utterances[row] = replace(utterances[row], **changes)
        first = write_and_load(tmp_path / "c.parquet")
        assert write_and_load(tmp_path / "d.parquet", tuple(utterances)).digest != first.digest

    def test_depends_on_order_inventory_and_frame_shift(self, tmp_path: Path) -> None:
        path = tmp_path / "c.parquet"
        digests = {
            write_and_load(path).digest,
            write_and_load(path, UTTERANCES[::-1]).digest,
            write_and_load(path, UTTERANCES[:2]).digest,
            write_and_load(path, inventory=ClassInventory(names=("sil", "a", "c"))).digest,
            write_and_load(path, hard_label_frame_shift_ms=30.0).digest,
        }
        assert len(digests) == 5
