"""``softlabels pull``: the labels of a subset are those of the dataset, whatever it is chosen by."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel_schemas import InputError, IntegrityError, SoftLabelDataset, Utterance, open_dataset, write_corpus
from softlabel_schemas.about import Description, read_about, write_about
from softlabel_schemas.cli import main
from softlabel_schemas.corpus import load_corpus
from softlabel_schemas.digest import LabelHash
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.shard_reader import ShardReader
from softlabel_schemas.subset import Subset
from softlabel_schemas.subset_choice import choose_hours, choose_shards, choose_utterances
from softlabel_schemas.targets import labels_digest
from softlabel_schemas.verification import verify
from tests.support.datasets import CODECS, INVENTORY, SPEC, random_rows, random_utterance, write_dataset
from tests.support.targets import assert_same_targets
from tests.support.trees import tree

V1 = Path(__file__).parents[2] / "golden" / "v1"
SECONDS_PER_FRAME = SPEC.frame_shift_ms / 1000


def softlabels(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SoftLabelDataset:
    """30 rows in 7 shards; utt-silent is skipped."""
    folder = tmp_path_factory.mktemp("whole") / "labels"
    written = write_dataset(str(folder), shard_format="parquet", num_shards=7, rows=random_rows(4, 30))
    write_about(ObjectStore(folder), Description(title="Read speech"))
    return open_dataset(written.url)


def ids_of(dataset: SoftLabelDataset) -> list[str]:
    return [utterance.utterance_id for utterance in dataset]


def check_subset(url: str, whole: SoftLabelDataset, expected: list[str]) -> SoftLabelDataset:
    """A published dataset of the ``expected`` utterances in the order of the whole, with the same labels."""
    found = open_dataset(url)
    assert [problem for _, problem in verify(found) if problem] == []
    assert ids_of(found) == expected
    label_hash, sums = LabelHash(), {"kept_mass": 0.0, "entropy": 0.0, "agreement": 0.0, "labelled": 0}
    for own, other in zip(found, whole.read_utterances(expected), strict=True):
        assert_same_targets(own.targets, other.targets)
        np.testing.assert_equal(astuple(own.stats), astuple(other.stats))
        label_hash.add_utterance(labels_digest(other.utterance_id, other.targets))
        frames = other.targets.num_frames
        sums["kept_mass"] += other.stats.kept_mass * frames
        sums["entropy"] += other.stats.entropy * frames
        if other.stats.agreement == other.stats.agreement:
            sums["agreement"] += other.stats.agreement * frames
            sums["labelled"] += frames
    manifest = found.manifest
    assert manifest.content_digest == label_hash.hexdigest()
    totals = [shard.sums for shard in manifest.shards]
    for name in ("kept_mass", "entropy", "agreement"):
        assert sum(getattr(each, name) for each in totals) == pytest.approx(sums[name])
    assert sum(each.num_labelled_frames for each in totals) == sums["labelled"]
    assert manifest.spec.subset_of is not None
    assert manifest.spec.subset_of.content_digest == whole.manifest.content_digest
    assert manifest.fingerprint != whole.manifest.fingerprint
    return found


def test_whole_shards_with_what_they_skipped(dataset: SoftLabelDataset, tmp_path: Path) -> None:
    result = softlabels("pull", dataset.store.url, str(tmp_path / "some"), "--shards", "5,0-1")
    assert result.exit_code == 0, result.stderr
    expected = [each for index in (0, 1, 5) for each in dataset.read_shard(index).utterance_ids]
    found = check_subset(str(tmp_path / "some"), dataset, expected)
    assert [entry.utterance_id for entry in found.manifest.skipped] == ["utt-silent"]
    assert found.manifest.spec.subset_of is not None
    assert found.manifest.spec.subset_of.choice == "shards 0-1,5"
    about = read_about(found.store)
    assert about is not None
    assert about.description.title == "Read speech"
    # Whole shards keep their bytes.
    assert [record.files for record in found.manifest.shards] == [dataset.manifest.shards[i].files for i in (0, 1, 5)]
    facts = json.loads(softlabels("describe", str(tmp_path / "some"), "--json").stdout)
    assert facts["subset_of"] == f"{dataset.manifest.content_digest} (shards 0-1,5)"


@pytest.mark.parametrize(("shard_format", "codec"), [*(("parquet", codec) for codec in CODECS), ("zarr", "mtf-sqrt")])
def test_utterances_of_every_format(tmp_path: Path, shard_format: str, codec: str) -> None:
    whole = open_dataset(write_dataset(str(tmp_path / "whole"), shard_format=shard_format, codec=codec).url)
    wanted = ["utt-bare", "utt-ü0", "utt-silent", "utt-ü3", "utt-none"]
    (tmp_path / "ids.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
    url = str(tmp_path / "some")
    result = softlabels("pull", whole.store.url, url, "--utterances", str(tmp_path / "ids.txt"))
    assert result.exit_code == 0, result.stderr
    found = check_subset(url, whole, [each for each in ids_of(whole) if each in wanted])
    assert [entry.utterance_id for entry in found.manifest.skipped] == ["utt-silent"]
    assert found["utt-ü3"].utterance_id == "utt-ü3"


def test_what_was_skipped_is_a_subset_too(dataset: SoftLabelDataset, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("utt-silent\n")
    result = softlabels("pull", dataset.store.url, str(tmp_path / "some"), "--utterances", str(tmp_path / "ids.txt"))
    assert result.exit_code == 0, result.stderr
    found = check_subset(str(tmp_path / "some"), dataset, [])
    assert [entry.reason for entry in found.manifest.skipped] == ["its audio is empty"]


def test_to_and_from_an_object_store(new_url: Callable[[str], str]) -> None:
    whole = open_dataset(write_dataset(new_url("memory"), shard_format="parquet").url)
    Subset(whole, choose_utterances(whole, ["utt-ü0", "utt-ü4"]), url := new_url("memory")).begin()
    subset = Subset(whole, choose_utterances(whole, ["utt-ü4", "utt-ü0"]), url)
    for index in subset.begin():
        subset.make_shard(index)
    subset.publish()
    check_subset(url, whole, ["utt-ü0", "utt-ü4"])


def test_from_a_dataset_of_format_version_1(tmp_path: Path) -> None:
    whole = open_dataset(V1 / "parquet")
    wanted = ids_of(whole)[::2]
    (tmp_path / "ids.txt").write_text("\n".join(wanted), encoding="utf-8")
    result = softlabels("pull", whole.store.url, str(tmp_path / "some"), "--utterances", str(tmp_path / "ids.txt"))
    assert result.exit_code == 0, result.stderr
    assert check_subset(str(tmp_path / "some"), whole, wanted).manifest.spec.format_version == 2


def test_all_rows_of_a_shard_are_the_shard_however_they_were_chosen(dataset: SoftLabelDataset, tmp_path: Path) -> None:
    """By ids, with what it skipped, and by hours, as by number."""
    for index, shard in enumerate(dataset.manifest.shards):
        ids = [*dataset.read_shard(index).utterance_ids, *(entry.utterance_id for entry in shard.skipped)]
        whole = choose_shards(dataset, str(index))
        assert choose_utterances(dataset, ids).digest() == whole.digest()
        assert choose_utterances(dataset, ids[1:]).digest() != whole.digest()
    rows = [random_utterance(np.random.default_rng(1), each, 5) for each in ("a", "b")]
    two = open_dataset(write_dataset(str(tmp_path / "two"), shard_format="parquet", num_shards=1, rows=rows).url)
    # A frame less than there is: the last utterance too.
    assert choose_hours(two, 9 * SECONDS_PER_FRAME / 3600).digest() == choose_shards(two, "0").digest()


@settings(max_examples=15)
@given(share=st.floats(0.01, 1.0))
def test_hours(dataset: SoftLabelDataset, share: float) -> None:
    total = dataset.manifest.num_frames * SECONDS_PER_FRAME / 3600
    choice = choose_hours(dataset, share * total)
    frames = {each.utterance_id: each.targets.num_frames for each in dataset}
    taken = [part.utterance_ids or dataset.read_shard(part.shard.index).utterance_ids for part in choice.parts]
    seconds = SECONDS_PER_FRAME * sum(frames[each] for ids in taken for each in ids)
    # Enough, and not an utterance more than needed.
    assert share * total * 3600 <= seconds + 1e-6
    assert seconds < share * total * 3600 + SECONDS_PER_FRAME * max(frames.values()) + 1e-6
    assert choice.digest() == choose_hours(dataset, share * total).digest()
    assert sum(part.utterance_ids is not None for part in choice.parts) <= 1


def test_hours_are_taken_from_shards_spread_over_the_dataset(dataset: SoftLabelDataset) -> None:
    total = dataset.manifest.num_frames * SECONDS_PER_FRAME / 3600
    indices = [part.shard.index for part in choose_hours(dataset, total / 2).parts]
    assert indices == sorted(indices)
    assert indices != list(range(len(indices)))
    for hours in (0.0, -1.0, total * 1.01, float("nan")):
        with pytest.raises(InputError, match="--hours must be above 0 and at most"):
            choose_hours(dataset, hours)


def write_speakers(dataset: SoftLabelDataset, folder: Path, labelled: Collection[str] | None = None) -> str:
    """A corpus of the dataset's rows, in two splits, and of one of a split without labels; speakers are a, b and c in turn.
    Hard labels have those in ``labelled``, or all."""
    ids = [*ids_of(dataset), "utt-silent", "utt-test"]
    rows = [
        Utterance(
            utterance_id=utterance_id,
            audio=f"audio/{index}.wav",
            sample_rate=16_000,
            num_samples=16_000,
            split="test" if utterance_id == "utt-test" else "train" if index % 5 else "train-5",
            speaker="abc"[index % 3],
            hard_labels=np.zeros(3, np.int32) if labelled is None or utterance_id in labelled else None,
        )
        for index, utterance_id in enumerate(ids)
    ]
    folder.mkdir()
    write_corpus(folder / "corpus.parquet", rows, inventory=INVENTORY, hard_label_frame_shift_ms=10.0)
    return str(folder / "corpus.parquet")


def test_speakers_and_their_corpus(dataset: SoftLabelDataset, tmp_path: Path) -> None:
    corpus = write_speakers(dataset, tmp_path / "corpus")
    (tmp_path / "speakers.txt").write_text("c\nb\n")
    args = ["pull", dataset.store.url, str(tmp_path / "some"), "--speakers", str(tmp_path / "speakers.txt")]
    assert "--speakers needs --corpus" in softlabels(*args).stderr
    result = softlabels(*args, "--corpus", corpus)
    assert result.exit_code == 0, result.stderr
    wanted = {row.utterance_id for row in load_corpus(corpus) if row.speaker in ("b", "c")} - {"utt-test"}
    found = check_subset(str(tmp_path / "some"), dataset, [each for each in ids_of(dataset) if each in wanted])
    rows = load_corpus(tmp_path / "some" / "corpus.parquet")
    # And what a student trained on them is evaluated on.
    assert {row.utterance_id for row in rows} == {*wanted, "utt-test"}
    assert {row.speaker for row in rows if row.split != "test"} == {"b", "c"}
    assert next(iter(rows)).audio == f"{tmp_path}/corpus/audio/1.wav"
    assert len(found) + len(found.manifest.skipped) == len(wanted)
    (tmp_path / "speakers.txt").write_text("d\n")
    assert "has no speaker 'd'" in softlabels(*args, "--corpus", corpus).stderr


def test_with_a_corpus_each_shard_is_fetched_once(
    dataset: SoftLabelDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a pull that is resumed once more, for their ids."""
    corpus = write_speakers(dataset, tmp_path / "corpus")
    args = ["pull", dataset.store.url, str(tmp_path / "some"), "--shards", "0-2", "--corpus", corpus]
    begun = Subset(dataset, choose_shards(dataset, "0-2"), str(tmp_path / "some"))
    begun.begin()
    begun.make_shard(1)
    read, found = ShardReader.read_columns, list[int]()

    def reading(reader: ShardReader, index: int) -> Any:
        found.append(index)
        return read(reader, index)

    monkeypatch.setattr(ShardReader, "read_columns", reading)
    assert softlabels(*args).exit_code == 0
    assert found == [0, 2, 1]
    rows = load_corpus(tmp_path / "some" / "corpus.parquet")
    wanted = [each for index in range(3) for each in dataset.read_shard(index).utterance_ids]
    assert {row.utterance_id for row in rows} == {*wanted, "utt-silent", "utt-test"}


def test_a_split_that_was_labelled_is_not_part_of_the_corpus_of_others(
    dataset: SoftLabelDataset, tmp_path: Path
) -> None:
    corpus = load_corpus(write_speakers(dataset, tmp_path / "corpus"))
    labelled = set(ids_of(dataset))
    assert {row.split for row in corpus} == {"train", "train-5", "test"}
    ids = [row.utterance_id for row in corpus if row.split == "train" and row.utterance_id in labelled][:3]
    for skipped in ([], ["utt-silent"]):
        (tmp_path / "ids.txt").write_text("\n".join(ids + skipped))
        output = str(tmp_path / f"some-{len(skipped)}")
        args = ("pull", dataset.store.url, output, "--utterances", str(tmp_path / "ids.txt"))
        result = softlabels(*args, "--corpus", str(tmp_path / "corpus" / "corpus.parquet"))
        assert result.exit_code == 0, result.stderr
        rows = {row.utterance_id for row in load_corpus(f"{output}/corpus.parquet")}
        assert rows == {*ids, *skipped, "utt-test"}


def test_it_goes_on_after_a_kill_to_the_same_bytes(dataset: SoftLabelDataset, tmp_path: Path) -> None:
    args = ["pull", dataset.store.url, "--shards", "1-4"]
    assert softlabels(*args, str(tmp_path / "once")).exit_code == 0
    begun = Subset(dataset, choose_shards(dataset, "1-4"), str(tmp_path / "twice"))
    assert begun.begin() == [0, 1, 2, 3]
    begun.make_shard(2)
    with pytest.raises(InputError, match="a run was begun there but is not finished"):
        open_dataset(tmp_path / "twice")
    other = softlabels("pull", dataset.store.url, "--shards", "1-3", str(tmp_path / "twice"))
    assert other.exit_code == 2
    assert "was started with other settings" in other.stderr
    assert softlabels(*args, str(tmp_path / "twice")).exit_code == 0
    assert tree(tmp_path / "twice") == tree(tmp_path / "once")


def test_run_again_it_leaves_what_was_said_of_the_subset(dataset: SoftLabelDataset, tmp_path: Path) -> None:
    args, store = ["pull", dataset.store.url, "--shards", "1", str(tmp_path / "some")], ObjectStore(tmp_path / "some")
    assert softlabels(*args).exit_code == 0
    assert read_about(store) == read_about(dataset.store)
    (tmp_path / "description.toml").write_text('title = "Ten hours of read speech"')
    assert softlabels("about", store.url, str(tmp_path / "description.toml")).exit_code == 0
    for said in (store.read("about.json"), b"of a newer writer"):
        store.put("about.json", said)
        assert softlabels(*args).exit_code == 0
        assert store.read("about.json") == said


@pytest.mark.parametrize("keep_ids", [False, True])
def test_ids_are_kept_where_they_will_be_asked_for(dataset: SoftLabelDataset, tmp_path: Path, keep_ids: bool) -> None:
    subset = Subset(dataset, choose_shards(dataset, "0-1"), str(tmp_path / "some"), keep_ids=keep_ids)
    for index in subset.begin():
        subset.make_shard(index)
    assert list(subset._ids_of_shard) == ([0, 1] if keep_ids else [])
    expected = [each for index in range(2) for each in dataset.read_shard(index).utterance_ids]
    assert set(subset.utterance_ids()) == {*expected, "utt-silent"}


def test_what_is_damaged_is_not_taken_over(tmp_path: Path) -> None:
    written = write_dataset(str(tmp_path / "whole"), shard_format="parquet", num_shards=2)
    file = tmp_path / "whole" / written.manifest.shards[1].folder / "shard.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    whole = open_dataset(written.url)
    subset = Subset(whole, choose_shards(whole, "0-1"), str(tmp_path / "some"))
    assert subset.begin() == [0, 1]
    subset.make_shard(0)
    with pytest.raises(IntegrityError, match=r"shard 1.*was changed after writing"):
        subset.make_shard(1)
    with pytest.raises(InputError, match="1 of 2 shards are not committed"):
        subset.publish()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give one of --hours, --speakers, --utterances and --shards"),
        (["--hours", "1", "--shards", "0"], "give one of"),
        (["--shards", "7"], "has the shards 0 to 6, found 7"),
        (["--shards", "3-1"], "such as 0-3,7; found '3-1'"),
        (["--shards", "a"], "such as 0-3,7; found 'a'"),
        (["--utterances", "no-such-file"], "no-such-file does not exist"),
    ],
)
def test_refusals(dataset: SoftLabelDataset, tmp_path: Path, args: list[str], message: str) -> None:
    result = softlabels("pull", dataset.store.url, str(tmp_path / "some"), *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "some").exists()


@pytest.mark.parametrize("option", ["--utterances", "--speakers"])
def test_a_list_in_another_encoding(dataset: SoftLabelDataset, tmp_path: Path, option: str) -> None:
    corpus = write_speakers(dataset, tmp_path / "corpus")
    (tmp_path / "names.txt").write_bytes("José\n".encode("latin-1"))
    args = ["pull", dataset.store.url, str(tmp_path / "some"), option, str(tmp_path / "names.txt")]
    result = softlabels(*args, "--corpus", corpus)
    assert result.exit_code == 2
    assert "names.txt is not UTF-8 text: " in result.stderr
    assert not (tmp_path / "some").exists()


def test_a_list_that_windows_wrote(dataset: SoftLabelDataset, tmp_path: Path) -> None:
    """With a byte order mark, and other ends of lines."""
    ids = ids_of(dataset)[:2]
    (tmp_path / "names.txt").write_bytes("\r\n".join([*ids, ""]).encode("utf-8-sig"))
    args = ("pull", dataset.store.url, str(tmp_path / "some"), "--utterances", str(tmp_path / "names.txt"))
    result = softlabels(*args)
    assert result.exit_code == 0, result.stderr
    assert ids_of(open_dataset(tmp_path / "some")) == ids


def test_another_corpus_is_not_replaced(dataset: SoftLabelDataset, tmp_path: Path) -> None:
    """Neither the one that is given nor one in an output that was begun; what an earlier attempt wrote may stay."""
    corpus = write_speakers(dataset, tmp_path / "corpus")
    before = tree(tmp_path)
    for output in ("corpus", "some"):
        if output == "some":
            assert softlabels("pull", dataset.store.url, str(tmp_path / output), "--shards", "0").exit_code == 0
            (tmp_path / output / "corpus.parquet").write_bytes(b"other")
            before = tree(tmp_path)
        result = softlabels("pull", dataset.store.url, str(tmp_path / output), "--shards", "0", "--corpus", corpus)
        assert (result.exit_code, f"{output}/corpus.parquet is there already" in result.stderr) == (2, True)
        assert tree(tmp_path) == before
    (tmp_path / "some" / "corpus.parquet").unlink()
    # The rows are compared, not the bytes of the file.
    for moved in (False, False, True):
        if moved:
            (tmp_path / "corpus").rename(tmp_path / "elsewhere")
            corpus = corpus.replace("/corpus/", "/elsewhere/")
        result = softlabels("pull", dataset.store.url, str(tmp_path / "some"), "--shards", "0", "--corpus", corpus)
        assert result.exit_code == 0, result.stderr


def test_a_corpus_without_hard_labels_is_the_same_once_more(dataset: SoftLabelDataset, tmp_path: Path) -> None:
    """One row of the corpus has some, which is not pulled."""
    manifest = write_speakers(dataset, tmp_path / "corpus", labelled=ids_of(dataset)[-1:])
    for _ in range(2):
        result = softlabels("pull", dataset.store.url, str(tmp_path / "some"), "--shards", "0", "--corpus", manifest)
        assert result.exit_code == 0, result.stderr


def test_unknown_utterances_and_the_dataset_itself(dataset: SoftLabelDataset) -> None:
    with pytest.raises(InputError, match=re.escape("has no utterance 'a', nor 1 others that are asked for")):
        choose_utterances(dataset, ["utt-ü0", "b", "a"])
    result = softlabels("pull", dataset.store.url, dataset.store.url, "--shards", "0")
    assert "is the dataset itself" in result.stderr


def test_subsets_are_not_combined(dataset: SoftLabelDataset, tmp_path: Path) -> None:
    softlabels("pull", dataset.store.url, str(tmp_path / "some"), "--shards", "0")
    args = ("--top-k", "4", "--output", str(tmp_path / "both"))
    result = softlabels("combine", str(tmp_path / "some"), dataset.store.url, *args)
    assert "is a subset (shards 0); combine whole datasets, then pull" in result.stderr
