"""``softlabels export``: what the tools that it is for read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import zarr
from click.testing import CliRunner, Result

from softlabel_schemas import SoftTargets, Utterance, open_dataset, write_corpus
from softlabel_schemas.cli import main
from softlabel_schemas.commit import begin, commit_shard, publish
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plain_export import write_zarr
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.shard import LabelledUtterance, Shard, UtteranceStats
from softlabel_schemas.spec import DatasetSpec
from tests.support.datasets import INVENTORY, TEMPERATURES, Written, make_document, random_rows, write_dataset
from tests.support.speech import (
    FRAME_SHIFT_MS,
    FRONT_END,
    SAMPLE_RATE,
    SoftDataset,
    Speech,
    save_corpus,
    write_soft_labels,
    write_speech,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Three shards; an utterance without frames, frames without entries, ids that are not all ASCII."""
    return write_dataset(str(tmp_path_factory.mktemp("export") / "labels"), shard_format="zarr", codec="packed-f32")


def export(url: str, form: str, output: Path, *args: str) -> Result:
    return CliRunner().invoke(main, ["export", url, "--to", form, "--output", str(output), *args])


def exported(url: str, form: str, output: Path, *args: str) -> Path:
    result = export(url, form, output, *args)
    assert result.exit_code == 0, result.output
    assert [path.name for path in output.parent.iterdir() if ".tmp-" in path.name] == []
    return output


def frames_of(targets: SoftTargets) -> list[list[tuple[int, float]]]:
    pairs = list(zip(targets.class_ids.tolist(), targets.log_probs.tolist(), strict=True))
    return [pairs[start:stop] for start, stop in zip(targets.offsets, targets.offsets[1:], strict=False)]


class TestParquet:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return exported(written.url, "parquet", tmp_path_factory.mktemp("parquet") / "plain")

    def test_files(self, written: Written, folder: Path) -> None:
        assert sorted(path.name for path in folder.iterdir()) == [
            "000000.parquet",
            "000001.parquet",
            "000002.parquet",
        ]
        metadata = pq.read_schema(folder / "000000.parquet").metadata
        assert json.loads(metadata[b"softlabels.inventory"]) == INVENTORY.model_dump(mode="json")
        assert json.loads(metadata[b"softlabels.temperatures"]) == list(TEMPERATURES)
        assert json.loads(metadata[b"softlabels.content_digest"]) == written.manifest.content_digest

    def check(self, written: Written, rows: list[dict[str, object]]) -> None:
        assert [row["utterance_id"] for row in rows] == [each.utterance_id for each in written.utterances]
        for row, expected in zip(rows, written.utterances, strict=True):
            frames = [
                list(zip(map(int, ids), map(float, log_probs), strict=True))
                for ids, log_probs in zip(row["class_ids"], row["log_probs"], strict=True)  # type: ignore[call-overload]
            ]
            assert frames == frames_of(expected.targets)
            assert row["num_frames"] == expected.targets.num_frames
            tail_mass = np.array([list(frame) for frame in row["tail_mass"]], np.float32)  # type: ignore[attr-defined]
            np.testing.assert_array_equal(tail_mass.reshape(-1, len(TEMPERATURES)), expected.targets.tail_mass)
            assert row["entropy"] == pytest.approx(expected.stats.entropy)
            agreement = row["agreement"]
            if np.isnan(expected.stats.agreement):
                assert agreement is None or np.isnan(float(agreement))  # type: ignore[arg-type]
            else:
                assert agreement == pytest.approx(expected.stats.agreement)

    def test_pandas(self, written: Written, folder: Path) -> None:
        pandas = pytest.importorskip("pandas", reason="pip install pandas")
        tables = [pandas.read_parquet(path) for path in sorted(folder.glob("*.parquet"))]
        self.check(written, pandas.concat(tables).to_dict("records"))

    def test_polars(self, written: Written, folder: Path) -> None:
        polars = pytest.importorskip("polars", reason="pip install polars")
        table = polars.read_parquet(f"{folder}/*.parquet")
        assert table.schema["class_ids"] == polars.List(polars.List(polars.UInt16))
        self.check(written, table.to_dicts())

    def test_duckdb(self, written: Written, folder: Path) -> None:
        duckdb = pytest.importorskip("duckdb", reason="pip install duckdb")
        with duckdb.connect() as connection:
            found = connection.execute(f"select * from '{folder}/*.parquet' order by filename, file_row_number")
            names = [column[0] for column in found.description]
            self.check(written, [dict(zip(names, row, strict=True)) for row in found.fetchall()])
            # An entry a row.
            counted = connection.execute(
                f"select count(*) from (select unnest(class_ids, recursive := true) from '{folder}/*.parquet')"
            )
            assert counted.fetchone() == (written.manifest.num_entries,)

    def test_hugging_face_datasets(self, written: Written, folder: Path, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets", reason="pip install datasets")
        table = datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", cache_dir=tmp_path)
        self.check(written, list(table))

    def test_the_per_utterance_columns_of_any_dataset(self, tmp_path: Path) -> None:
        """Without an export, whatever the codec."""
        duckdb = pytest.importorskip("duckdb", reason="pip install duckdb")
        polars = pytest.importorskip("polars", reason="pip install polars")
        pandas = pytest.importorskip("pandas", reason="pip install pandas")
        datasets = pytest.importorskip("datasets", reason="pip install datasets")
        written = write_dataset(str(tmp_path / "labels"), shard_format="parquet")
        files, columns = f"{written.url}/shards/*/shard.parquet", ["utterance_id", "num_frames", "num_entries"]
        with duckdb.connect() as connection:
            found = connection.execute(f"select {', '.join(columns)} from '{files}' order by filename").fetchall()
        assert found == [(u.utterance_id, u.targets.num_frames, u.targets.num_entries) for u in written.utterances]
        assert polars.read_parquet(files).select(columns).rows() == found
        each = [
            pandas.read_parquet(path, columns=columns)
            for path in sorted(Path(written.url).glob("shards/*/shard.parquet"))
        ]
        assert list(pandas.concat(each).itertuples(index=False, name=None)) == found
        table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "cache")
        assert [tuple(row[column] for column in columns) for row in table] == found


def test_zarr(written: Written, tmp_path: Path) -> None:
    folder = exported(written.url, "zarr", tmp_path / "plain")
    group = zarr.open_group(folder, mode="r")
    assert group.attrs["temperatures"] == list(TEMPERATURES)
    assert group.attrs["inventory"] == INVENTORY.model_dump(mode="json")
    assert group.attrs["content_digest"] == written.manifest.content_digest
    arrays = {name: array[:] for name, array in group.arrays()}
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "utterance_id_bytes": "uint8",
        "utterance_id_offsets": "int64",
        "frame_offsets": "int64",
        "entry_offsets": "int64",
        "class_ids": "uint16",
        "log_probs": "float32",
        "tail_mass": "float32",
    }
    ids, starts = arrays["utterance_id_bytes"].tobytes(), arrays["utterance_id_offsets"]
    for index, expected in enumerate(written.utterances):
        assert ids[starts[index] : starts[index + 1]].decode() == expected.utterance_id
        first, last = arrays["frame_offsets"][index : index + 2]
        offsets = arrays["entry_offsets"][first : last + 1]
        targets = SoftTargets(
            num_classes=50,
            temperatures=TEMPERATURES,
            offsets=offsets - offsets[0],
            class_ids=arrays["class_ids"][offsets[0] : offsets[-1]],
            log_probs=arrays["log_probs"][offsets[0] : offsets[-1]],
            tail_mass=arrays["tail_mass"][first:last],
        ).validate()
        assert frames_of(targets) == frames_of(expected.targets)
        np.testing.assert_array_equal(targets.tail_mass, expected.targets.tail_mass)


def test_zarr_is_written_shard_by_shard(written: Written, tmp_path: Path) -> None:
    """Nothing waits in memory for the last shard; there are as many ids as utterances."""
    dataset = open_dataset(written.url)

    def watched() -> Iterator[Shard]:
        ids = b""
        for shard in dataset.iter_shards():
            yield shard
            ids += "".join(shard.utterance_ids).encode()
            arrays = dict(zarr.open_group(tmp_path / "plain", mode="r").arrays())
            assert arrays["utterance_id_bytes"][:].tobytes() == ids  # type: ignore[union-attr]
            assert arrays["utterance_id_offsets"][:].max() == len(ids)  # type: ignore[union-attr]

    write_zarr(dataset, watched(), tmp_path / "plain")


def test_more_classes_than_16_bits_hold(tmp_path: Path) -> None:
    inventory = ClassInventory(names=tuple(f"token-{index}" for index in range(70_000)))
    document = make_document(1, shard_format="parquet", codec="packed-f32", num_shards=1)
    fields = document.spec.fields() | {"num_classes": 70_000, "inventory_digest": inventory.digest()}
    document = document.model_copy(update={"spec": DatasetSpec.model_validate(fields, strict=False)})
    targets = SoftTargets(
        num_classes=70_000,
        temperatures=TEMPERATURES,
        offsets=np.array([0, 1]),
        class_ids=np.array([69_999], np.int32),
        log_probs=np.zeros(1, np.float32),
        tail_mass=np.zeros((1, 3), np.float32),
    )
    store = ObjectStore(tmp_path / "labels")
    begin(store, document, inventory)
    stats = UtteranceStats(kept_mass=1.0, entropy=0.0, agreement=float("nan"))
    row = LabelledUtterance(utterance_id="u", targets=targets, stats=stats)
    commit_shard(store, document, ShardRange(index=0, first_row=0, num_rows=1), [row], [])
    publish(store, document)
    folder = exported(store.url, "parquet", tmp_path / "plain")
    assert pq.read_table(folder / "000000.parquet")["class_ids"].to_pylist() == [[[69_999]]]
    group = zarr.open_group(exported(store.url, "zarr", tmp_path / "group"), mode="r")
    assert group["class_ids"][:].tolist() == [69_999]  # type: ignore[index, union-attr]


class TestKaldi:
    def test_posteriors_are_renormalised_over_the_kept_classes(self, written: Written, tmp_path: Path) -> None:
        kaldi_native_io = pytest.importorskip("kaldi_native_io", reason="pip install '.[kaldi]'")
        folder = exported(written.url, "kaldi", tmp_path / "post")
        # By the script file, whose paths must be those of the folder's final name.
        with kaldi_native_io.SequentialPosteriorReader(f"scp:{folder}/post.scp") as reader:
            found = dict(reader)
        assert list(found) == [each.utterance_id for each in written.utterances]
        for expected in written.utterances:
            posterior = found[expected.utterance_id]
            assert len(posterior) == expected.targets.num_frames
            for pairs, kept in zip(posterior, frames_of(expected.targets), strict=True):
                mass = sum(np.exp(log_prob) for _, log_prob in kept)
                assert [class_id for class_id, _ in pairs] == [class_id for class_id, _ in kept]
                assert [prob for _, prob in pairs] == pytest.approx([np.exp(log_prob) / mass for _, log_prob in kept])

    @pytest.mark.parametrize("utterance_id", ["a b", "a\x01b"])
    def test_an_id_with_a_space(self, tmp_path: Path, utterance_id: str) -> None:
        pytest.importorskip("kaldi_native_io", reason="pip install '.[kaldi]'")
        first, *others = random_rows()
        assert isinstance(first, LabelledUtterance)
        spaced = LabelledUtterance(utterance_id=utterance_id, targets=first.targets, stats=first.stats)
        write_dataset(str(tmp_path / "labels"), shard_format="parquet", rows=[spaced, *others])
        result = export(str(tmp_path / "labels"), "kaldi", tmp_path / "post")
        assert (result.exit_code, list(tmp_path.iterdir())) == (2, [tmp_path / "labels"])
        assert f"utterance id {utterance_id!r} has spaces or control characters" in result.stderr


class TestLhotse:
    @pytest.fixture(scope="class")
    @classmethod
    def speech(cls, tmp_path_factory: pytest.TempPathFactory) -> Speech:
        return write_speech(tmp_path_factory.mktemp("speech"))

    @pytest.fixture(scope="class")
    @classmethod
    def labels(cls, speech: Speech) -> SoftDataset:
        return write_soft_labels(speech.folder / "labels", speech.split("train"))

    def test_cuts_with_temporal_arrays(self, speech: Speech, labels: SoftDataset, tmp_path: Path) -> None:
        lhotse = pytest.importorskip("lhotse", reason="pip install lhotse")
        folder = exported(labels.url, "lhotse", tmp_path / "cuts", "--corpus", speech.manifest)
        cuts = lhotse.CutSet.from_file(folder / "cuts.jsonl.gz").to_eager()
        lhotse.validate(cuts)
        assert [cut.id for cut in cuts] == [each.utterance_id for each in speech.split("train")]
        for cut in cuts:
            targets = labels.targets[cut.id]
            ids_TM, log_probs_TM = targets.padded()
            np.testing.assert_array_equal(cut.load_soft_label_log_probs(), log_probs_TM)
            ids_TM[np.isneginf(log_probs_TM)] = -1
            np.testing.assert_array_equal(cut.load_soft_label_ids(), ids_TM)
            np.testing.assert_array_equal(cut.load_soft_label_tail_mass(), targets.tail_mass)
            (row,) = [each for each in speech.utterances if each.utterance_id == cut.id]
            assert cut.load_audio().shape == (1, row.num_samples)
        # The arrays follow when a cut is cut.
        part = cuts[0].truncate(offset=2 * FRAME_SHIFT_MS / 1000, duration=3 * FRAME_SHIFT_MS / 1000)
        np.testing.assert_array_equal(part.load_soft_label_tail_mass(), labels.targets[cuts[0].id].tail_mass[2:5])

    def test_segments_of_a_recording(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that begins it, and one whose last frame has less than half of its samples, which Lhotse rounds off. Of the
        recording only the header is read."""
        lhotse = pytest.importorskip("lhotse", reason="pip install lhotse")
        samples_of_frame = round(SAMPLE_RATE * FRAME_SHIFT_MS / 1000)
        soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, SAMPLE_RATE), SAMPLE_RATE)
        utterances = [
            Utterance(
                utterance_id=f"part-{start}",
                audio="a.wav",
                sample_rate=SAMPLE_RATE,
                num_samples=num_samples,
                split="train",
                hard_labels=np.zeros(10, np.int32),
                start_sample=start,
            )
            for start, num_samples in ((0, 10 * samples_of_frame), (2400, 9 * samples_of_frame + 60))
        ]
        speech = save_corpus(tmp_path, utterances)
        front_end = FRONT_END.model_copy(update={"snip_edges": False})
        labels = write_soft_labels(tmp_path / "labels", utterances, num_shards=1, front_end=front_end)
        read, found = ObjectStore.read_range, list[int]()

        def reading(store: ObjectStore, key: str, start: int, stop: int) -> bytes:
            found.extend([stop - start] if key == "a.wav" else [])
            return read(store, key, start, stop)

        monkeypatch.setattr("softlabel_schemas.lhotse_cuts._HEADER_BYTES", 1024)
        monkeypatch.setattr(ObjectStore, "read_range", reading)
        result = export(labels.url, "lhotse", tmp_path / "cuts", "--corpus", speech.manifest)
        assert 0 < sum(found) <= 4096 < (tmp_path / "a.wav").stat().st_size
        assert result.exit_code == 0, result.stderr
        assert "\n1 utterances end in the first half of their last frame: cut.load_soft_label_ids()" in result.stdout
        cuts = lhotse.CutSet.from_file(tmp_path / "cuts" / "cuts.jsonl.gz").to_eager()
        for cut, utterance, num_loaded in zip(cuts, utterances, (10, 9), strict=True):
            assert cut.recording.num_samples == SAMPLE_RATE
            assert cut.load_audio().shape == (1, utterance.num_samples)
            assert len(cut.soft_label_ids.load()) == 10
            assert len(cut.load_soft_label_ids()) == num_loaded

    @pytest.mark.parametrize(
        ("data", "message"), [(None, "does not exist"), (b"RIFF", "are not readable"), (b"", "are not")]
    )
    def test_a_recording_that_cannot_be_read(self, tmp_path: Path, data: bytes | None, message: str) -> None:
        samples = np.random.default_rng(0).uniform(-0.5, 0.5, SAMPLE_RATE)
        soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE)
        utterance = Utterance(
            utterance_id="a", audio="a.wav", sample_rate=SAMPLE_RATE, num_samples=4000, split="train", start_sample=0
        )
        speech = save_corpus(tmp_path, [utterance])
        labels = write_soft_labels(tmp_path / "labels", [utterance], num_shards=1)
        (tmp_path / "a.wav").unlink()
        if data is not None:
            (tmp_path / "a.wav").write_bytes(data)
        result = export(labels.url, "lhotse", tmp_path / "cuts", "--corpus", speech.manifest)
        assert result.exit_code == 2
        assert f"{tmp_path}/a.wav" in result.stderr
        assert message in result.stderr

    def test_the_corpus_of_others(self, speech: Speech, labels: SoftDataset, tmp_path: Path) -> None:
        rows = speech.located()
        write_corpus(tmp_path / "short.parquet", [replace(row, num_samples=99, hard_labels=None) for row in rows])
        write_corpus(tmp_path / "part.parquet", [replace(rows[-1], hard_labels=None)])
        for name, message in (
            ("short", "lasts 0.012375 s in the corpus manifest given, but has"),
            ("part", "train-00 is not in"),
        ):
            result = export(labels.url, "lhotse", tmp_path / "cuts", "--corpus", str(tmp_path / f"{name}.parquet"))
            assert result.exit_code == 2
            assert message in result.stderr
            assert not (tmp_path / "cuts").exists()

    def test_the_corpus_is_needed_and_for_lhotse_only(self, labels: SoftDataset, tmp_path: Path) -> None:
        for form, args, message in (
            ("lhotse", (), "--to lhotse needs --corpus"),
            ("zarr", ("--corpus", "c.parquet"), "--corpus belongs to --to lhotse; found --to zarr"),
        ):
            result = export(labels.url, form, tmp_path / "cuts", *args)
            assert (result.exit_code, message in result.stderr) == (2, True)


class TestFolder:
    def test_what_exists_is_not_replaced(self, written: Written, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        result = export(written.url, "parquet", tmp_path / "there")
        assert (result.exit_code, list((tmp_path / "there").iterdir())) == (2, [])
        assert "there exists already; give a new folder" in result.stderr

    def test_a_url_is_refused(self, written: Written) -> None:
        result = CliRunner().invoke(main, ["export", written.url, "--to", "zarr", "--output", "s3://bucket/plain"])
        assert result.exit_code == 2
        assert "--output s3://bucket/plain is a URL; export into a folder" in result.stderr

    @pytest.mark.parametrize("form", ["kaldi", "parquet", "zarr"])
    def test_a_damaged_dataset_leaves_nothing(self, tmp_path: Path, form: str) -> None:
        if form == "kaldi":
            pytest.importorskip("kaldi_native_io", reason="pip install '.[kaldi]'")
        damaged = write_dataset(str(tmp_path / "labels"), shard_format="parquet")
        last = open_dataset(damaged.url).manifest.shards[-1]
        (path,) = Path(damaged.url).glob(f"shards/{last.index:06d}-*/shard.parquet")
        path.write_bytes(path.read_bytes()[:-1])
        assert export(damaged.url, form, tmp_path / "out").exit_code == 1
        assert list(tmp_path.iterdir()) == [tmp_path / "labels"]

    def test_a_killed_export_has_not_the_name(self, written: Written, tmp_path: Path) -> None:
        """Killed at the last moment: all is written, nothing is flushed."""
        output = tmp_path / "out"
        code = (
            "import os, signal; from softlabel_schemas import export_cli; from softlabel_schemas.cli import main\n"
            "export_cli.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"main(['export', {written.url!r}, '--to', 'parquet', '--output', {str(output)!r}])"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob("out.tmp-*/*.parquet"))) == 3
        assert not output.exists()
        assert export(written.url, "parquet", output).exit_code == 0
        assert len(list(output.glob("*.parquet"))) == 3
