"""``softlabels diff``: the divergence against whole posteriors, its bound, and what two datasets share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel_schemas.cli import main
from softlabel_schemas.codec import build_codec
from softlabel_schemas.distance import distance, same_targets
from softlabel_schemas.selection import TopK
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from softlabel_schemas.spec import CodecName
from softlabel_schemas.targets import SoftTargets
from tests.support.datasets import CODECS, NUM_CLASSES, SPEC, TEMPERATURES, random_rows, write_dataset
from tests.support.targets import random_log_posterior, ranking, targets_from_dense


def top(log_posterior_TV: np.ndarray, k: int) -> SoftTargets:
    kept_TV = np.zeros(log_posterior_TV.shape, dtype=bool)
    np.put_along_axis(kept_TV, ranking(log_posterior_TV)[:, :k], True, axis=1)
    return targets_from_dense(log_posterior_TV, kept_TV, TEMPERATURES)


def decoded(targets: SoftTargets, codec_name: CodecName) -> SoftTargets:
    update = {"codec": codec_name, "num_classes": targets.num_classes, "selection": TopK(k=targets.num_classes)}
    codec, frame_offsets = build_codec(SPEC.model_copy(update=update)), np.array([0, targets.num_frames])
    return codec.decode(codec.encode(targets, frame_offsets), frame_offsets)


def kl_T(log_p_TV: np.ndarray, log_q_TV: np.ndarray) -> np.ndarray:
    p, q = log_p_TV.astype(np.float64), log_q_TV.astype(np.float64)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 20), scale=st.floats(0.1, 8.0))
@settings(max_examples=60)
def test_it_is_a_lower_bound_and_exact_where_all_was_kept(seed: int, k: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    log_a, log_b = (random_log_posterior(rng, 6, 20, scale) for _ in range(2))
    part, whole = distance(top(log_a, k), top(log_b, k)), distance(top(log_a, 20), top(log_b, 20))
    exact_ab, exact_ba = kl_T(log_a, log_b), kl_T(log_b, log_a)
    np.testing.assert_allclose(whole.kl_ab_T, exact_ab, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(whole.kl_ba_T, exact_ba, atol=1e-4, rtol=1e-3)
    assert (part.kl_ab_T <= exact_ab * 1.001 + 1e-4).all()
    assert (part.kl_ba_T <= exact_ba * 1.001 + 1e-4).all()
    assert (part.kl_ab_T >= 0).all()
    np.testing.assert_array_equal(part.same_top1_T, log_a.argmax(axis=1) == log_b.argmax(axis=1))
    assert (whole.num_shared_T == 20).all()
    assert (part.num_shared_T <= k).all()


def test_a_narrower_selection_of_one_posterior_is_no_distance() -> None:
    log_posterior_TV = random_log_posterior(np.random.default_rng(0), 50, NUM_CLASSES)
    found = distance(top(log_posterior_TV, 20), top(log_posterior_TV, 3))
    assert max(found.kl_ab_T.max(), found.kl_ba_T.max()) < 1e-6
    assert found.same_top1_T.all()
    assert (found.num_shared_T == 3).all()


@pytest.mark.parametrize("scale", [4.0, 12.0])
@pytest.mark.parametrize("codec_a", CODECS)
@pytest.mark.parametrize("codec_b", CODECS)
def test_how_much_of_it_was_stored_and_by_which_codec_is_no_distance(
    codec_a: CodecName, codec_b: CodecName, scale: float
) -> None:
    """All classes against 20 of them, in frames of which most are sure. What the codecs round is at most about (entries + 1) /
    (6 x 192^2), and what both of them store is at most the distance of the posteriors."""
    rng = np.random.default_rng(0)
    log_p, log_q = (random_log_posterior(rng, 50, 638, scale) for _ in range(2))
    p_a, p_b = decoded(top(log_p, 638), codec_a), decoded(top(log_p, 20), codec_b)
    found = distance(p_a, p_b, codec_a, codec_b)
    assert max(found.kl_ab_T.mean(), found.kl_ba_T.mean()) < 3e-4
    assert max(found.kl_ab_T.max(), found.kl_ba_T.max()) < 1e-3
    for q_b in (decoded(top(log_q, 638), codec_b), decoded(top(log_q, 20), codec_b)):
        other = distance(p_a, q_b, codec_a, codec_b)
        assert 2 < other.kl_ab_T.mean() < 1.001 * kl_T(log_p, log_q).mean()
        assert 2 < other.kl_ba_T.mean() < 1.001 * kl_T(log_q, log_p).mean()


def test_by_hand() -> None:
    """Shared is class 0 alone: 0.5 against 0.25, the rest 0.5 against 0.75."""
    a = np.log(np.array([[0.5, 0.3, 0.1, 0.1]], dtype=np.float32))
    b = np.log(np.array([[0.25, 0.1, 0.6, 0.05]], dtype=np.float32))
    first = targets_from_dense(a, np.array([[True, True, False, False]]), (1.0,))
    second = targets_from_dense(b, np.array([[True, False, True, False]]), (1.0,))
    found = distance(first, second)
    assert found.kl_ab_T == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)], abs=1e-6)
    assert found.kl_ba_T == pytest.approx([0.25 * np.log(0.5) + 0.75 * np.log(0.75 / 0.5)], abs=1e-6)
    assert (found.same_top1_T.tolist(), found.num_shared_T.tolist()) == ([False], [1])


def test_frames_without_entries_are_not_compared() -> None:
    log_posterior_TV = random_log_posterior(np.random.default_rng(0), 3, NUM_CLASSES)
    targets = top(log_posterior_TV, 4)
    bare = targets.keep(np.repeat([True, False, True], targets.counts_T))
    found = distance(targets, bare)
    assert found.is_known_T.tolist() == [True, False, True]
    assert found.kl_ab_T[1] == 0
    assert same_targets(targets, targets)
    assert not same_targets(targets, bare)
    with pytest.raises(ValueError, match="cannot be compared"):
        distance(targets, targets.frames(0, 2))


def diff(*args: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["diff", *args, "--json"])
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_two_codecs_of_the_same_labels(tmp_path: Path) -> None:
    rows = random_rows(1, 30)
    a = write_dataset(str(tmp_path / "a"), shard_format="parquet", codec="packed-f32", num_shards=3, rows=rows)
    b = write_dataset(str(tmp_path / "b"), shard_format="zarr", codec="mtf-sqrt", num_shards=2, rows=rows[:-5])
    found = diff(a.url, b.url)
    assert set(found["settings"]) == {"codec", "shard_format", "num_shards", "num_rows"}
    assert found["settings"]["codec"] == {"a": "packed-f32", "b": "mtf-sqrt"}
    labels = found["labels"]
    assert (labels["utterances"], labels["only_in_a"]) == (24, 5)
    assert labels["of_other_length"] == 0
    assert labels["entries_a"] == labels["entries_b"] == labels["entries_shared"]
    # What the codec states: (entries + 1) / (6 x 192^2).
    assert 0 < labels["kl_ab_nats"] < 1e-4
    assert labels["kl_ab_nats"] <= labels["max_utterance_kl_ab_nats"] < 1e-3
    assert labels["top1_agreement"] > 0.98
    assert diff(b.url, a.url)["labels"]["kl_ba_nats"] == pytest.approx(labels["kl_ab_nats"])


def test_the_same_dataset(tmp_path: Path) -> None:
    a = write_dataset(str(tmp_path / "a"), shard_format="parquet", num_shards=4)
    found = diff(a.url, a.url)
    assert found["settings"] == {}
    assert found["labels"]["identical_utterances"] == found["labels"]["utterances"] == 8
    assert found["labels"]["kl_ab_nats"] == 0
    assert found["labels"]["top1_agreement"] == 1
    assert diff(a.url, a.url, "--fraction", "0.3")["labels"]["utterances"] < 8
    text = CliRunner().invoke(main, ["diff", a.url, a.url]).stdout.splitlines()
    assert text[0] == "the settings are the same"
    assert "top1_agreement            1" in text


def test_an_utterance_of_other_frames_is_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stats = UtteranceStats(kept_mass=0.0, entropy=0.0, agreement=0.0)

    def write(name: str, num_frames: int) -> str:
        targets = top(random_log_posterior(rng, num_frames, NUM_CLASSES), 8)
        row = LabelledUtterance(utterance_id="a", targets=targets, stats=stats)
        return write_dataset(str(tmp_path / name), shard_format="parquet", num_shards=1, rows=[row]).url

    labels = diff(write("a", 5), write("b", 6))["labels"]
    assert (labels["utterances"], labels["of_other_length"], labels["frames"]) == (1, 1, 0)
    assert labels["kl_ab_nats"] is None
