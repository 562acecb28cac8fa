"""``softlabels combine``: a dataset of datasets, killed, resumed, and refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from softlabel_schemas import InputError, open_dataset
from softlabel_schemas.cli import main
from softlabel_schemas.combine import combine_targets
from softlabel_schemas.combined_dataset import CombinedDataset
from softlabel_schemas.frame_selection import FrameSelection
from softlabel_schemas.narrowing import check_derivable
from softlabel_schemas.selection import Mass, RandomSampling, TopK
from softlabel_schemas.spec import TeacherSpec
from softlabel_schemas.verification import verify
from tests.support.datasets import CODECS, NUM_CLASSES
from tests.support.members import member_rows, write_member
from tests.support.targets import assert_same_targets
from tests.support.trees import tree


def softlabels(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def combine(urls: Sequence[str], output: Path, *options: str) -> Result:
    return softlabels("combine", *urls, "--output", str(output), "--top-k", "6", *options)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two teachers, cut into different shards; each skipped other utterances."""
    folder = tmp_path_factory.mktemp("inputs")
    return [
        write_member(folder / "tdnn", member_rows(1, skipped=[2]), num_shards=3),
        write_member(
            folder / "blstm",
            member_rows(2, skipped=[7], temperatures=(1.0, 4.0)),
            name="blstm",
            num_shards=2,
            temperatures=(1.0, 4.0),
        ),
    ]


@pytest.mark.parametrize("method", ["arithmetic", "log_linear"])
def test_each_utterance_is_combined(urls: list[str], tmp_path: Path, method: Any) -> None:
    result = combine(urls, tmp_path / "both", "--weights", "1,3", "--method", method)
    assert result.exit_code == 0, result.output
    assert "3 shards, 2 utterances skipped; content digest" in result.stdout
    assert "combine: " in result.stderr
    first, second, both = (open_dataset(url) for url in (*urls, tmp_path / "both"))
    assert [problem for _, problem in verify(both) if problem] == []
    assert [each.utterance_id for each in both] == [f"utt-{index}" for index in (0, 1, 3, 4, 5, 6, 8)]
    for found in both:
        targets = [first[found.utterance_id].targets, second[found.utterance_id].targets]
        expected = combine_targets(targets, [0.25, 0.75], method, both.manifest.spec.temperatures, top_k=6)
        assert_same_targets(found.targets, expected.targets)
        assert found.stats.kept_mass == pytest.approx(expected.targets.kept_mass_T().mean(), abs=1e-6)
        assert found.stats.entropy == pytest.approx(expected.entropy_T.mean(), abs=1e-6)
        assert np.isnan(found.stats.agreement)


def test_what_is_skipped_names_the_input(urls: list[str], tmp_path: Path) -> None:
    assert combine(urls, tmp_path / "both").exit_code == 0
    reasons = {entry.utterance_id: entry.reason for entry in open_dataset(tmp_path / "both").manifest.skipped}
    assert reasons == {"utt-2": "input 1 of 2 (tdnn): fault 1", "utt-7": "input 2 of 2 (blstm): fault 2"}


def test_the_spec_names_teachers_and_inputs(urls: list[str], tmp_path: Path) -> None:
    assert combine(urls, tmp_path / "both", "--weights", "1,3").exit_code == 0
    spec = open_dataset(tmp_path / "both").manifest.spec
    assert [(teacher.name, teacher.weight) for teacher in spec.teachers] == [("tdnn", 0.25), ("blstm", 0.75)]
    assert (spec.selection, spec.temperatures, spec.combination) == (TopK(k=6), (1.0, 4.0), "arithmetic")
    digests = [open_dataset(url).manifest.content_digest for url in urls]
    assert spec.combined_from is not None
    assert [(each.content_digest, each.weight) for each in spec.combined_from] == list(
        zip(digests, [0.25, 0.75], strict=True)
    )
    facts = json.loads(softlabels("describe", str(tmp_path / "both"), "--json").stdout)
    assert facts["combined_from"] == [f"{digests[0]} (0.25)", f"{digests[1]} (0.75)"]


def test_temperatures_that_an_input_lacks_are_said(urls: list[str], tmp_path: Path) -> None:
    third = write_member(
        tmp_path / "third", member_rows(3, temperatures=(1.0, 8.0)), name="cnn", temperatures=(1.0, 8.0)
    )
    result = combine([*urls, third], tmp_path / "all")
    assert result.stderr.startswith(
        f"warning: temperature 2 is left out: {urls[1]}, {third} did not store it\n"
        f"warning: temperature 4 is left out: {third} did not store it\n"
        f"warning: temperature 8 is left out: {urls[0]}, {urls[1]} did not store it\n"
    )
    assert open_dataset(tmp_path / "all").manifest.spec.temperatures == (1.0,)
    assert "warning" not in combine([third], tmp_path / "one").stderr


def test_inputs_that_are_narrower_than_the_result_are_said(tmp_path: Path) -> None:
    wide = write_member(tmp_path / "wide", member_rows(1), selection=TopK(k=8))
    narrow = write_member(tmp_path / "narrow", member_rows(2), name="blstm", selection=Mass(mass=0.5, max_entries=20))
    result = combine([wide, narrow], tmp_path / "both")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(
        f"warning: {narrow} has frames of 1 entry, fewer than --top-k: what students derive"
    )
    assert result.stderr.count("warning: ") == 1


def test_temperatures_that_a_codec_cannot_tell_are_left_out(tmp_path: Path) -> None:
    """Of a dataset of all classes; in one of few, from labels without loss, they are told."""
    temperatures = (1.0, 4.0)
    whole = member_rows(1, temperatures=temperatures, is_whole=True)
    selection = TopK(k=NUM_CLASSES)
    for codec, kept in (("mtf-sqrt", (1.0,)), ("packed-f32", temperatures)):
        url = write_member(tmp_path / codec, whole, codec=codec, temperatures=temperatures, selection=selection)
        result = combine([url], tmp_path / f"combined-{codec}")
        assert result.exit_code == 0, result.output
        assert open_dataset(tmp_path / f"combined-{codec}").manifest.spec.temperatures == kept
        said = (
            f"warning: temperature 4 is left out: of {url} codec 'mtf-sqrt' stores every probability below 6.8e-06 as"
        )
        assert result.stderr.startswith(said) == (kept == (1.0,))


@pytest.mark.parametrize("codec", CODECS)
def test_a_log_linear_ensemble_of_what_a_codec_cannot_tell_is_refused(tmp_path: Path, codec: str) -> None:
    """Three teachers of all classes: each is raised to 1/3, as at temperature 3."""
    whole = {"selection": TopK(k=NUM_CLASSES)}
    inputs = [
        write_member(tmp_path / str(seed), member_rows(seed, is_whole=True), name="t" * seed, codec=codec, **whole)
        for seed in (1, 2, 3)
    ]
    result = combine(inputs, tmp_path / "all", "--method", "log_linear")
    if codec == "packed-f32":
        assert result.exit_code == 0, result.output
    else:
        assert result.exit_code == 2
        assert (
            f"{inputs[0]} is raised to its weight 0.333 in a 'log_linear' ensemble, which is temperature 3"
            in result.stderr
        )
        assert "; at temperature 3 49 such entries of a frame would weigh 0.0" in result.stderr
        assert "label with targets.codec = \"packed-f32\", or combine by 'arithmetic'" in result.stderr
        assert not (tmp_path / "all").exists()
    assert combine(inputs, tmp_path / "sum").exit_code == 0


def test_ensembles_can_be_combined(urls: list[str], tmp_path: Path) -> None:
    """Weights are multiplied; an ensemble of the other kind is refused."""
    third = write_member(tmp_path / "third", member_rows(3), name="conformer")
    for method in ("arithmetic", "log_linear"):
        assert combine(urls, tmp_path / method, "--method", method).exit_code == 0
    result = combine([str(tmp_path / "arithmetic"), third], tmp_path / "all", "--weights", "2,1")
    assert result.exit_code == 0
    teachers = open_dataset(tmp_path / "all").manifest.spec.teachers
    assert [round(teacher.weight, 6) for teacher in teachers] == [0.333333] * 3
    result = combine([str(tmp_path / "log_linear"), third], tmp_path / "other")
    assert result.exit_code == 2
    assert "is a 'log_linear' ensemble already, it cannot be a member of a 'arithmetic' one" in result.stderr


def folds_of_teachers(*folds: int) -> dict[str, Any]:
    """Fields of a spec; one teacher for each fold that is given, and equal weights within a fold."""
    return {
        "teachers": tuple(
            TeacherSpec(name=f"t{index}", digest=format(index, "064x"), weight=1 / folds.count(fold), fold=fold)
            for index, fold in enumerate(folds)
        ),
        "num_folds": 2,
        "speakers_digest": "d" * 64,
    }


@pytest.mark.parametrize("folds", [(0, 1, 1), (0, 0, 1)])
def test_an_ensemble_of_the_other_kind_in_any_fold(tmp_path: Path, folds: tuple[int, ...]) -> None:
    single = write_member(tmp_path / "single", member_rows(1), **folds_of_teachers(0, 1))
    other = write_member(
        tmp_path / "other", member_rows(2), **folds_of_teachers(*folds) | {"combination": "log_linear"}
    )
    result = combine([single, other], tmp_path / "both")
    assert result.exit_code == 2
    assert f"{other} is a 'log_linear' ensemble already" in result.stderr
    assert combine([single, other], tmp_path / "both", "--method", "log_linear").exit_code == 0


def test_one_teacher_for_each_fold_is_no_ensemble(tmp_path: Path) -> None:
    fields = folds_of_teachers(0, 1) | {"combination": "log_linear"}
    inputs = [write_member(tmp_path / str(seed), member_rows(seed), **fields) for seed in (1, 2)]
    assert combine(inputs, tmp_path / "both").exit_code == 0


def test_killed_and_resumed_it_has_the_same_bytes(urls: list[str], tmp_path: Path) -> None:
    def made(output: Path) -> CombinedDataset:
        return CombinedDataset([open_dataset(url) for url in urls], [1.0, 1.0], "arithmetic", 6, str(output))

    assert combine(urls, tmp_path / "whole").exit_code == 0
    killed = made(tmp_path / "resumed")
    assert killed.begin() == [0, 1, 2]
    killed.make_shard(1)
    with pytest.raises(InputError, match="2 of 3 shards are not committed"):
        killed.publish()
    assert made(tmp_path / "resumed").begin() == [0, 2]
    for _ in range(2):
        assert combine(urls, tmp_path / "resumed").exit_code == 0
    assert tree(tmp_path / "resumed") == tree(tmp_path / "whole")


def test_other_settings_at_the_same_output(urls: list[str], tmp_path: Path) -> None:
    assert combine(urls, tmp_path / "both").exit_code == 0
    result = combine(urls, tmp_path / "both", "--weights", "1,2")
    assert result.exit_code == 2
    assert "was started with other settings" in result.stderr
    assert "combined_from: there" in result.stderr


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"corpus_digest": "e" * 64}, f"corpus_digest differs: {'c' * 64} in "),
        ({"frame_shift_ms": 30.0}, "frame_shift_ms differs: 10.0 in "),
        ({"precision": "bfloat16"}, "precision differs: float32 in "),
        (
            {"selection": TopK(k=8, frames=FrameSelection(disagreeing=0.0))},
            "was labelled without some frames (selection.frames)",
        ),
    ],
)
def test_datasets_that_do_not_fit_together(urls: list[str], tmp_path: Path, spec: dict[str, Any], message: str) -> None:
    other = write_member(tmp_path / "other", member_rows(4), **spec)
    result = combine([urls[0], other], tmp_path / "both")
    assert result.exit_code == 2
    assert message in result.stderr
    assert other in result.stderr
    assert not (tmp_path / "both").exists()


def test_frames_that_differ(urls: list[str], tmp_path: Path) -> None:
    other = write_member(tmp_path / "other", member_rows(4, longer=[3]), name="other")
    result = combine([urls[0], other], tmp_path / "both")
    assert result.exit_code == 2
    assert f"utterance utt-3: input 2 has (frames, classes) (9, {NUM_CLASSES}), the first has (8" in result.stderr


@pytest.mark.parametrize("method", ["arithmetic", "log_linear"])
def test_samples_are_not_combined(urls: list[str], tmp_path: Path, method: str) -> None:
    """What is kept of their mean are its luckiest draws."""
    sampled = {"selection": RandomSampling(draws=8), "temperatures": (1.0,)}
    other = write_member(tmp_path / "sampled", member_rows(4, temperatures=(1.0,)), **sampled)
    result = combine([urls[0], other], tmp_path / "both", "--method", method)
    assert result.exit_code == 2
    assert f"{other} stores samples ('random_sampling')" in result.stderr
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_sample_is_derived_only_of_an_ensemble_of_all_classes(
    urls: list[str], tmp_path: Path, is_whole: bool
) -> None:
    """Of members that did not keep all classes the ensemble has not either, however many were asked for."""
    other = urls[1]
    if is_whole:
        whole = {"selection": TopK(k=NUM_CLASSES)}
        other = write_member(tmp_path / "whole", member_rows(4, is_whole=True), name="whole", **whole)
    assert combine([urls[0], other], tmp_path / "both", "--top-k", str(NUM_CLASSES)).exit_code == 0
    dataset = open_dataset(tmp_path / "both")
    counts = {int(count) for row in dataset.read_shard(0) for count in row.targets.counts_T}
    assert (counts == {NUM_CLASSES}) == is_whole
    stored, wanted = dataset.manifest.spec.selection, RandomSampling(draws=4)
    if is_whole:
        check_derivable(stored, wanted, num_classes=NUM_CLASSES)
    else:
        with pytest.raises(InputError, match=f"a sample is drawn from all {NUM_CLASSES} classes"):
            check_derivable(stored, wanted, num_classes=NUM_CLASSES)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("1", "expected 2 positive weights, one for each dataset, found 1"),
        ("1,-2", "expected 2 positive weights, one for each dataset, found 1, -2"),
        ("1,nan", "expected 2 positive weights, one for each dataset, found 1, nan"),
        ("1e308,1e308", "the weights 1e+308, 1e+308 are too large or too far apart"),
        ("1e-300,1e300", "the weights 1e-300, 1e+300 are too large or too far apart"),
        ("", "--weights are numbers separated by commas, such as 1,2; found ''"),
        ("1;2", "--weights are numbers separated by commas, such as 1,2; found '1;2'"),
    ],
)
def test_weights_that_are_none(urls: list[str], tmp_path: Path, weights: str, message: str) -> None:
    result = combine(urls, tmp_path / "both", "--weights", weights)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_the_same_labels_twice(urls: list[str], tmp_path: Path) -> None:
    result = combine([urls[0], urls[0]], tmp_path / "both")
    assert result.exit_code == 2
    assert "the same labels are given twice" in result.stderr


@pytest.mark.parametrize("codec", ["mtf-sqrt", "packed-u8"])
def test_lossy_codecs(tmp_path: Path, codec: str) -> None:
    """Decoded masses that add up to 1 only within the codec's bound are normalised first."""
    inputs = [write_member(tmp_path / str(seed), member_rows(seed), name="t" * seed, codec=codec) for seed in (5, 6)]
    assert combine(inputs, tmp_path / "both").exit_code == 0
    assert [problem for _, problem in verify(open_dataset(tmp_path / "both")) if problem] == []
