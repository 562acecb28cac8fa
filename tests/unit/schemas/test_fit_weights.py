"""Mixture weights: EM against a fine grid, and from stored targets."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel_schemas import Utterance, write_corpus
from softlabel_schemas.cli import main
from softlabel_schemas.combine import Estimate
from softlabel_schemas.fit_weights import mixture_weights
from softlabel_schemas.selection import RandomSampling
from softlabel_schemas.shard import LabelledUtterance
from tests.support.datasets import INVENTORY, NUM_CLASSES, Row
from tests.support.members import member_rows, write_member


def log_likelihood(log_probs_MN: np.ndarray, weights_M: np.ndarray) -> float:
    return float(np.log(weights_M @ np.exp(log_probs_MN)).mean())


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_no_other_weights_are_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_probs_MN = np.log(rng.beta(0.5, 2.0, (2, 200)) + 1e-9)
    weights_M = mixture_weights(log_probs_MN)
    assert weights_M.sum() == pytest.approx(1)
    best = max(log_likelihood(log_probs_MN, np.array([w, 1 - w])) for w in np.linspace(0, 1, 501))
    assert log_likelihood(log_probs_MN, weights_M) >= best - 1e-7


def test_the_weights_of_a_known_mixture_are_found() -> None:
    """Labels drawn from 0.7 of one teacher and 0.3 of the other."""
    rng = np.random.default_rng(1)
    first_NV, second_NV = rng.dirichlet([0.3] * 10, 40_000), rng.dirichlet([0.3] * 10, 40_000)
    mixed_NV = np.where(rng.random((40_000, 1)) < 0.7, first_NV, second_NV)
    labels_N1 = (mixed_NV.cumsum(axis=1) < rng.random((40_000, 1))).sum(axis=1, keepdims=True).clip(max=9)
    probs_MN = np.stack([np.take_along_axis(each, labels_N1, axis=1)[:, 0] for each in (first_NV, second_NV)])
    np.testing.assert_allclose(mixture_weights(np.log(probs_MN + 1e-30)), [0.7, 0.3], atol=0.02)


def test_probabilities_that_underflow() -> None:
    log_probs_MN = np.array([[-2000.0, -1000.0, -3.0], [-2001.0, -1001.0, -4.0]])
    np.testing.assert_allclose(mixture_weights(log_probs_MN), [1.0, 0.0], atol=1e-4)


# From stored targets


def corpus_of(path: Path, labels: dict[str, np.ndarray | None], *, split: str = "dev") -> str:
    utterances = [
        Utterance(
            utterance_id=each,
            audio=f"{each}.wav",
            sample_rate=16_000,
            num_samples=16_000,
            split=split,
            hard_labels=found,
        )
        for each, found in labels.items()
    ]
    write_corpus(path, utterances, inventory=INVENTORY, hard_label_frame_shift_ms=10.0)
    return str(path)


def labels_of(seed: int) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray | None] = {
        f"utt-{index}": rng.integers(-1, NUM_CLASSES, 5 + index).astype(np.int32) for index in range(9)
    }
    # A frame without a label behind one of the last class: -1 follows in the numbering of all classes of all frames.
    gaps_T = np.where(np.arange(10) % 2 == 0, NUM_CLASSES - 1, -1).astype(np.int32)
    return found | {"utt-4": None, "utt-5": gaps_T}


def test_from_stored_targets(tmp_path: Path) -> None:
    """Kept labels and estimates, without the frames that have no label, and utterances that are skipped or have none."""
    both, labels = [member_rows(1, skipped=[2]), member_rows(2)], labels_of(3)
    urls = [write_member(tmp_path / f"labels-{index}", each, name="t" * (index + 1)) for index, each in enumerate(both)]
    corpus = corpus_of(tmp_path / "corpus.parquet", labels)
    result = CliRunner().invoke(main, ["fit-weights", *urls, "--corpus", corpus, "--split", "dev", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    log_probs = []
    for each in both:
        of_teacher = []
        for row in each:
            labels_T = labels[row.utterance_id]
            if isinstance(row, LabelledUtterance) and labels_T is not None and row.utterance_id != "utt-2":
                of_teacher.append(Estimate(row.targets).log_prob_T(labels_T)[labels_T >= 0])
        log_probs.append(np.concatenate(of_teacher))
    log_probs_MN = np.stack(log_probs)
    expected_M = mixture_weights(log_probs_MN)
    np.testing.assert_allclose(found["weights"], expected_M)
    assert found["num_frames"] == log_probs_MN.shape[1]
    assert found["num_skipped"] == 1
    np.testing.assert_allclose(found["alone"], log_probs_MN.mean(axis=1))
    assert found["equal"] == pytest.approx(log_likelihood(log_probs_MN, np.array([0.5, 0.5])))
    assert found["fitted"] == pytest.approx(log_likelihood(log_probs_MN, expected_M))
    assert found["fitted"] >= max(found["equal"], *found["alone"])


def test_weights_are_not_fitted_on_samples(tmp_path: Path) -> None:
    """A label that was not drawn would count as impossible: the weights would be of the numbers of draws."""
    sampled = {"selection": RandomSampling(draws=8), "temperatures": (1.0,)}
    urls = [
        write_member(tmp_path / "1", member_rows(1), name="t"),
        write_member(tmp_path / "2", member_rows(2, temperatures=(1.0,)), name="tt", **sampled),
    ]
    corpus = corpus_of(tmp_path / "corpus.parquet", labels_of(3))
    result = CliRunner().invoke(main, ["fit-weights", *urls, "--corpus", corpus, "--split", "dev"])
    assert result.exit_code == 2
    assert f"{urls[1]} stores samples ('random_sampling')" in result.stderr


def test_it_says_how_to_go_on(tmp_path: Path) -> None:
    urls = [write_member(tmp_path / f"seed {seed}", member_rows(seed), name="t" * seed) for seed in (1, 2)]
    corpus = corpus_of(tmp_path / "corpus.parquet", labels_of(3))
    result = CliRunner().invoke(main, ["fit-weights", *urls, "--corpus", corpus, "--split", "dev"])
    assert result.exit_code == 0
    assert result.stdout.startswith("log-likelihood of ")
    assert "without" not in result.stdout
    args = shlex.split(result.stdout.splitlines()[-1])
    assert args[:5] == ["softlabels", "combine", *urls, "--weights"]
    assert sum(map(float, args[5].split(","))) == pytest.approx(1, abs=1e-3)
    assert args[6:] == ["--top-k", "K", "--output", "OUTPUT"]


def test_a_teacher_that_adds_nothing_is_left_out_of_what_is_said(tmp_path: Path) -> None:
    """Its weight is 0 in the end, with which ``combine`` refuses it."""
    labels = labels_of(3)
    urls = [
        write_member(tmp_path / "1", member_rows(1), name="t"),
        write_member(tmp_path / "wrong", [always_wrong(row, labels) for row in member_rows(2)], name="wrong"),
        write_member(tmp_path / "3", member_rows(3), name="ttt"),
    ]
    options = ["--corpus", corpus_of(tmp_path / "corpus.parquet", labels), "--split", "dev"]
    found = json.loads(CliRunner().invoke(main, ["fit-weights", *urls, *options, "--json"]).stdout)
    assert found["weights"][1] == 0
    result = CliRunner().invoke(main, ["fit-weights", *urls, *options])
    assert f"  without {urls[1]}, whose weight is below 1e-06\n" in result.stdout
    _, *args = shlex.split(result.stdout.splitlines()[-1])
    assert args[1:3] == [urls[0], urls[2]]
    made = {"K": "4", "OUTPUT": str(tmp_path / "both")}
    assert CliRunner().invoke(main, [made.get(each, each) for each in args]).exit_code == 0


def always_wrong(row: Row, labels: dict[str, np.ndarray | None]) -> Row:
    """All mass of each frame on one class, which is not its label."""
    assert isinstance(row, LabelledUtterance)
    num_frames, labels_T = row.targets.num_frames, labels[row.utterance_id]
    targets = replace(
        row.targets,
        offsets=np.arange(num_frames + 1),
        class_ids=np.zeros(num_frames, np.int32) if labels_T is None else (labels_T + 1) % np.int32(NUM_CLASSES),
        log_probs=np.zeros(num_frames, np.float32),
        tail_mass=np.zeros_like(row.targets.tail_mass),
    )
    return replace(row, targets=targets)


@pytest.mark.parametrize(
    ("labels", "split", "message"),
    [
        (labels_of(3), "test", "the corpus has no split test; it has dev"),
        ({"utt-0": np.zeros(6, np.int32)}, "dev", "has 5 frames, the corpus 6 hard labels"),
        ({"utt-0": None}, "dev", "no frame has both a hard label and soft targets"),
        ({"utt-9": np.zeros(5, np.int32)}, "dev", "utt-9: no such utterance"),
        ({"utt-0": np.full(5, NUM_CLASSES, np.int32)}, "dev", "hard labels run from 50 to 50"),
    ],
)
def test_a_corpus_that_does_not_fit(
    tmp_path: Path, labels: dict[str, np.ndarray | None], split: str, message: str
) -> None:
    urls = [write_member(tmp_path / str(seed), member_rows(seed), name="t" * seed) for seed in (1, 2)]
    corpus = corpus_of(tmp_path / "corpus.parquet", labels)
    result = CliRunner().invoke(main, ["fit-weights", *urls, "--corpus", corpus, "--split", split])
    assert result.exit_code == 2
    assert message in result.stderr
