"""The contract of a dataset: one suite over shard formats, stores and codecs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from softlabel_schemas import InputError, IntegrityError, LabelledUtterance, layout, open_dataset, verify
from softlabel_schemas.cli import main
from softlabel_schemas.codec import build_codec
from softlabel_schemas.commit import begin, commit_shard, committed_shards, publish, read_manifest, read_spec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.describe import description
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.manifest import SkippedUtterance, SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.shard import encode_columns
from tests.support.datasets import (
    CODECS,
    INVENTORY,
    SHARD_FORMATS,
    Written,
    commit_rows,
    cut_evenly,
    make_document,
    random_rows,
    write_dataset,
)
from tests.support.targets import assert_within_bound

NewUrl = Callable[[str], str]
NUM_SHARDS = 3
ROWS = random_rows()
RANGES = cut_evenly(len(ROWS), NUM_SHARDS)


@pytest.fixture(scope="module")
def written(new_url: NewUrl, shard_format: str, store_name: str, codec: str) -> Written:
    """A published dataset that no test changes."""
    return write_dataset(new_url(store_name), shard_format=shard_format, codec=codec, num_shards=NUM_SHARDS)


@pytest.fixture
def document(shard_format: str, codec: str) -> SpecDocument:
    return make_document(len(ROWS), shard_format=shard_format, codec=codec, num_shards=NUM_SHARDS)


def assert_same_utterance(found: LabelledUtterance, expected: LabelledUtterance, codec: str) -> None:
    assert found.utterance_id == expected.utterance_id
    assert (found.stats.kept_mass, found.stats.entropy) == (expected.stats.kept_mass, expected.stats.entropy)
    assert found.stats.agreement == pytest.approx(expected.stats.agreement, abs=0, nan_ok=True)
    assert_within_bound(codec, found.targets, expected.targets)


class TestReading:
    def test_iteration_yields_what_was_written(self, written: Written, codec: str) -> None:
        dataset = open_dataset(written.url)
        found = list(dataset)
        assert len(dataset) == len(found) == len(written.utterances)
        for utterance, expected in zip(found, written.utterances, strict=True):
            assert_same_utterance(utterance, expected, codec)

    def test_by_index_and_by_id(self, written: Written, codec: str) -> None:
        dataset = open_dataset(written.url)
        # Backwards, so that every shard boundary is crossed and shards are dropped from the cache.
        for index, expected in reversed(list(enumerate(written.utterances))):
            assert_same_utterance(dataset[index], expected, codec)
            assert_same_utterance(dataset[expected.utterance_id], expected, codec)

    def test_read_shard_has_the_rows_of_its_record(self, written: Written) -> None:
        dataset = open_dataset(written.url)
        assert dataset.num_shards == NUM_SHARDS
        for shard_range in RANGES:
            shard = dataset.read_shard(shard_range.index)
            own = ROWS[shard_range.first_row : shard_range.first_row + shard_range.num_rows]
            assert list(shard.utterance_ids) == [row.utterance_id for row in own if isinstance(row, LabelledUtterance)]
            assert [utterance.utterance_id for utterance in shard] == list(shard.utterance_ids)

    @pytest.mark.parametrize("index", [-1, 8])
    def test_an_index_outside_raises(self, written: Written, index: int) -> None:
        with pytest.raises(IndexError, match=f"utterance {index} asked for, the dataset has 8"):
            open_dataset(written.url)[index]

    @pytest.mark.parametrize("index", [-1, NUM_SHARDS])
    def test_a_shard_outside_raises(self, written: Written, index: int) -> None:
        with pytest.raises(IndexError, match=f"shard {index} asked for, the dataset has 3"):
            open_dataset(written.url).read_shard(index)

    def test_an_unknown_id_raises(self, written: Written) -> None:
        with pytest.raises(KeyError, match="utt-nobody: no such utterance"):
            open_dataset(written.url)["utt-nobody"]

    def test_a_skipped_id_raises_with_the_reason(self, written: Written) -> None:
        dataset = open_dataset(written.url)
        assert dataset.manifest.skipped == (SkippedUtterance(utterance_id="utt-silent", reason="its audio is empty"),)
        with pytest.raises(KeyError, match="utt-silent: it was skipped: its audio is empty"):
            dataset["utt-silent"]

    def test_the_inventory_is_stored(self, written: Written) -> None:
        assert open_dataset(written.url).inventory == INVENTORY

    def test_verify_finds_nothing(self, written: Written) -> None:
        assert list(verify(open_dataset(written.url))) == [(index, "") for index in range(NUM_SHARDS)]

    def test_describe_totals(self, written: Written) -> None:
        facts = description(open_dataset(written.url))
        utterances = written.utterances
        frames = sum(utterance.targets.num_frames for utterance in utterances)
        labelled = [utterance for utterance in utterances if not math.isnan(utterance.stats.agreement)]
        shards = ObjectStore(written.url).list("shards")
        assert 0 < len(labelled) < len(utterances)
        expected = {
            "url": written.url,
            "utterances": len(utterances),
            "skipped": 1,
            "frames": frames,
            "hours": frames / 360_000,
            "entries": sum(utterance.targets.num_entries for utterance in utterances),
            "bytes": sum(len(ObjectStore(written.url).read(key)) for key in shards),
            "shards": NUM_SHARDS,
            "kept_mass": sum(u.stats.kept_mass * u.targets.num_frames for u in utterances) / frames,
            "entropy_nats": sum(u.stats.entropy * u.targets.num_frames for u in utterances) / frames,
            "hard_label_agreement": sum(u.stats.agreement * u.targets.num_frames for u in labelled)
            / sum(u.targets.num_frames for u in labelled),
            "fingerprint": written.document.spec.fingerprint(),
            "content_digest": written.manifest.content_digest,
        }
        assert {name: facts[name] for name in expected} == {
            name: pytest.approx(value) if isinstance(value, float) else value for name, value in expected.items()
        }

    def test_only_the_files_of_the_format_are_left(self, written: Written) -> None:
        record_files = {f"{shard.folder}/{file.name}" for shard in written.manifest.shards for file in shard.files}
        commits = {f"commits/{index:06d}.json" for index in range(NUM_SHARDS)}
        table = written.manifest.bucket_table()
        buckets = {layout.index_bucket(bucket, table.sha256(bucket)) for bucket in range(len(table))}
        expected = {"spec.json", "inventory.json", "manifest.json"} | commits | record_files | buckets
        assert set(ObjectStore(written.url).list("")) == expected
        if "://" not in written.url:
            root = Path(written.url)
            assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == expected


class TestWriting:
    def test_a_container_is_a_pure_function(self, document: SpecDocument) -> None:
        utterances = [row for row in ROWS if isinstance(row, LabelledUtterance)]
        container, codec = CONTAINERS[document.storage.shard_format], build_codec(document.spec)
        first, again = (container.encode(encode_columns(utterances, codec), codec.zstd_level) for _ in range(2))
        assert first == again

    def test_parquet_stores_a_missing_agreement_as_null(self, new_url: NewUrl) -> None:
        """As SQL engines need it: a mean over NaN would be NaN."""
        written = write_dataset(new_url("memory"), shard_format="parquet", num_shards=1)
        record = written.manifest.shards[0]
        data = ObjectStore(written.url).read(f"{record.folder}/{record.files[0].name}")
        stored = pq.read_table(io.BytesIO(data))["agreement"].to_pylist()
        expected = [utterance.stats.agreement for utterance in written.utterances]
        assert None in stored
        assert stored == [None if math.isnan(value) else value for value in expected]

    def test_committing_twice_changes_nothing(self, store: ObjectStore, document: SpecDocument) -> None:
        begin(store, document, INVENTORY)
        records = [commit_rows(store, document, RANGES[0], ROWS) for _ in range(2)]
        assert records[0] == records[1]
        assert len({key.split("/")[1] for key in store.list("shards")}) == 1
        assert committed_shards(store) == {0}

    def test_a_second_writer_with_other_bytes_loses(
        self, store: ObjectStore, document: SpecDocument, codec: str
    ) -> None:
        begin(store, document, INVENTORY)
        won = commit_rows(store, document, RANGES[0], ROWS)
        # The same ids with other labels, as from a GPU that rounds differently.
        assert commit_rows(store, document, RANGES[0], random_rows(seed=1)) == won
        for shard_range in RANGES[1:]:
            commit_rows(store, document, shard_range, ROWS)
        publish(store, document)
        manifest = read_manifest(store)
        assert manifest.shards[0] == won.shard
        folders = {"/".join(key.split("/")[:2]) for key in store.list("shards")}
        assert len(folders - {shard.folder for shard in manifest.shards}) == 1
        for found, expected in zip(open_dataset(store.url).read_shard(0), [ROWS[0], ROWS[2]], strict=True):
            assert isinstance(expected, LabelledUtterance)
            assert_same_utterance(found, expected, codec)
        assert not any(problem for _, problem in verify(open_dataset(store.url)))

    def test_beginning_again_with_the_same_settings_joins(self, store: ObjectStore, document: SpecDocument) -> None:
        begin(store, document, INVENTORY)
        before = store.list("")
        begin(store, document, INVENTORY)
        assert store.list("") == before
        assert read_spec(store) == document

    @pytest.mark.parametrize("field", ["corpus_digest", "num_shards"])
    def test_beginning_with_other_settings_names_the_field(
        self, store: ObjectStore, document: SpecDocument, field: str
    ) -> None:
        begin(store, document, INVENTORY)
        other = (
            SpecDocument(spec=document.spec.model_copy(update={field: "e" * 64}), storage=document.storage)
            if field == "corpus_digest"
            else SpecDocument(spec=document.spec, storage=document.storage.model_copy(update={field: 4}))
        )
        shown = "'e{64}'" if field == "corpus_digest" else "4"
        with pytest.raises(InputError, match=rf"started with other settings.*:\n  {field}: there .*, here {shown}$"):
            begin(store, other, INVENTORY)
        assert read_spec(store) == document

    def test_beginning_with_another_inventory_raises(self, store: ObjectStore, document: SpecDocument) -> None:
        other = ClassInventory(names=("a", "b"))
        with pytest.raises(InputError, match=f"inventory has .* .'{other.digest()}', 2., the spec names .*, 50"):
            begin(store, document, other)
        assert not store.list("")

    def test_beginning_beside_another_inventory_raises(self, store: ObjectStore, document: SpecDocument) -> None:
        begin(store, document, INVENTORY)
        store.put("inventory.json", ClassInventory(names=("a", "b")).to_json())
        with pytest.raises(IntegrityError, match="is not the class inventory that the spec names"):
            begin(store, document, INVENTORY)

    def test_publishing_without_a_shard_raises(self, store: ObjectStore, document: SpecDocument) -> None:
        begin(store, document, INVENTORY)
        commit_rows(store, document, RANGES[1], ROWS)
        with pytest.raises(InputError, match="2 of 3 shards are not committed, the first is shard 0"):
            publish(store, document)
        assert not store.exists("manifest.json")

    def test_publishing_twice_changes_nothing(self, written: Written) -> None:
        store = ObjectStore(written.url)
        before = store.read("manifest.json")
        publish(store, written.document)
        assert read_manifest(store) == written.manifest
        assert store.read("manifest.json") == before

    def test_another_manifest_is_not_replaced(self, store: ObjectStore, document: SpecDocument) -> None:
        begin(store, document, INVENTORY)
        for shard_range in RANGES:
            commit_rows(store, document, shard_range, ROWS)
        other = write_dataset(
            f"{store.url}-other",
            shard_format=document.storage.shard_format,
            codec=document.spec.codec,
            rows=random_rows(seed=1),
        )
        store.put("manifest.json", ObjectStore(other.url).read("manifest.json"))
        with pytest.raises(IntegrityError, match="is not the manifest of its commit records"):
            publish(store, document)

    def test_invalid_targets_are_not_committed(self, store: ObjectStore, document: SpecDocument) -> None:
        begin(store, document, INVENTORY)
        good = next(row for row in ROWS if isinstance(row, LabelledUtterance))
        broken = LabelledUtterance(
            utterance_id="broken", targets=good.targets.keep(good.targets.log_probs > 0), stats=good.stats
        )
        broken.targets.tail_mass[:] = 0.5
        with pytest.raises(ValueError, match=r"utterance broken: frame 0: kept mass \+ tail mass 0.5, expected 1"):
            commit_shard(store, document, ShardRange(index=0, first_row=0, num_rows=1), [broken], [])
        assert committed_shards(store) == set()

    @pytest.mark.parametrize("begun", [False, True])
    def test_without_a_manifest_every_reader_refuses(
        self, store: ObjectStore, document: SpecDocument, begun: bool
    ) -> None:
        if begun:
            begin(store, document, INVENTORY)
            for shard_range in RANGES:
                commit_rows(store, document, shard_range, ROWS)
        hint = "run the same job again to resume it" if begun else "check the URL"
        with pytest.raises(InputError, match=f"is not a published dataset.*{hint}"):
            open_dataset(store.url)
        for command in ("describe", "verify"):
            result = CliRunner().invoke(main, [command, store.url])
            assert result.exit_code == 2
            assert result.stdout == ""
            assert hint in result.stderr


class TestContentDigest:
    def test_depends_on_the_labels_alone(self, new_url: NewUrl) -> None:
        shuffled = tuple(ROWS[index] for index in (5, 0, 8, 3, 1, 7, 2, 6, 4))
        ways = [
            {"shard_format": shard_format, "num_shards": num_shards, "rows": rows, "last_shard_first": last_first}
            for shard_format in SHARD_FORMATS
            for num_shards, rows, last_first in ((1, ROWS, False), (3, ROWS, True), (9, shuffled, False))
        ]
        digests = {
            write_dataset(new_url(store), **way).manifest.content_digest
            for store in ("local", "memory")
            for way in ways
        }
        assert len(digests) == 1

    def test_depends_on_every_label(self, new_url: NewUrl) -> None:
        labelled = [row for row in ROWS if isinstance(row, LabelledUtterance)]
        renamed = LabelledUtterance(utterance_id="other", targets=labelled[0].targets, stats=labelled[0].stats)
        row_sets = [labelled, labelled[:-1], [renamed, *labelled[1:]], list(random_rows(seed=1))]
        digests = {
            write_dataset(new_url("memory"), shard_format="parquet", codec=codec, rows=rows).manifest.content_digest
            for codec in CODECS
            for rows in row_sets
        }
        assert len(digests) == len(CODECS) * len(row_sets)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    written = write_dataset(f"file://{tmp_path}/labels", shard_format="parquet")
    assert open_dataset(tmp_path / "labels").manifest == written.manifest
