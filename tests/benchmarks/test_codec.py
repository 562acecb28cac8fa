"""The codec benchmark at small size: its figures are there and true; how fast they are is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.codec import BASELINE, CODECS, figures, load, main
from tests.support.targets import dense_posterior, random_log_posterior, ranking

NUM_CLASSES = 300


@pytest.fixture
def posteriors(tmp_path: Path) -> Path:
    log_posterior_TV = random_log_posterior(np.random.default_rng(0), 200, NUM_CLASSES, scale=2.5, slowness=0.9)
    ranked_TV = ranking(log_posterior_TV)[:, :64]
    log_probs_TL = np.take_along_axis(log_posterior_TV, ranked_TV, axis=1)
    mass_T = np.take_along_axis(dense_posterior(log_posterior_TV, 1.0), ranked_TV, axis=1).sum(axis=1)
    np.savez(
        tmp_path / "posteriors.npz",
        frames_per_utterance=np.array([50, 1, 149], dtype=np.uint32),
        class_ids=ranked_TV.astype(np.uint16),
        log_probs=log_probs_TL,
        tail_mass=(1 - mass_T).astype(np.float32),
        num_classes=np.int64(NUM_CLASSES),
    )
    return tmp_path / "posteriors.npz"


def test_one_json_document_with_a_row_for_each_codec(posteriors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(posteriors), "--top-k", "20", "--repeats", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["num_frames"], found["top_k"], set(found["results"])) == (200, 20, {*CODECS, BASELINE})
    for row in found["results"].values():
        assert row["bytes_per_frame"] >= row["shard_bytes_per_frame"] > 0
        assert row["write_frames_per_s"] > 0
        assert row["read_frames_per_s"] > 0
        assert 0 <= row["kl_mean"] <= row["kl_p99"] < 1e-2
    rows = found["results"]
    assert rows["packed-f32"]["kl_mean"] < 1e-12 < rows[BASELINE]["kl_mean"] < rows["mtf-sqrt"]["kl_mean"] < 1e-4
    assert rows["mtf-sqrt"]["shard_bytes_per_frame"] < rows["packed-u8"]["shard_bytes_per_frame"]


def test_the_divergence_is_that_of_known_posteriors(posteriors: Path) -> None:
    loaded = load(posteriors, 1)
    # Half of the top class's mass moves to the tail.
    top_T = np.exp(loaded.log_probs_TK[:, 0].astype(np.float64))
    expected_T = top_T * np.log(2) + (1 - top_T) * np.log((1 - top_T) / (1 - top_T / 2))
    found_T = loaded.kl_T(loaded.log_probs_TK - np.log(2), 1 - top_T / 2)
    np.testing.assert_allclose(found_T, expected_T, rtol=1e-5, atol=1e-7)


def test_figures(posteriors: Path) -> None:
    named = {figure.name: figure for figure in figures(posteriors, repeats=1)}
    assert len(named) == 5
    assert named["codec, top-20: mean KL"].met
    assert all(figure.ratio is not None and figure.ratio > 0 for figure in named.values())
