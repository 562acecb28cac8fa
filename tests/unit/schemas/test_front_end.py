"""Fbank: samples are handed over in pieces; the features are those of all at once."""

from __future__ import annotations

import numpy as np
import pytest
from kaldi_native_fbank import FbankOptions, OnlineFbank

from softlabel_schemas import front_end
from softlabel_schemas.front_end import Fbank

PIECE = front_end._CHUNK_SAMPLES


def of_all_at_once(samples: np.ndarray, *, snip_edges: bool) -> np.ndarray:
    options = FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = snip_edges
    options.mel_opts.num_bins = 40
    bank = OnlineFbank(options)
    bank.accept_waveform(16_000, samples)
    bank.input_finished()
    return np.stack([bank.get_frame(t) for t in range(bank.num_frames_ready)])


@pytest.mark.parametrize("snip_edges", [False, True])
@pytest.mark.parametrize(
    "num_samples", [400, PIECE - 1, PIECE, PIECE + 1, PIECE + 200, 2 * PIECE, 2 * PIECE + 399, 16_000 * 7 + 13]
)
def test_pieces_give_what_all_samples_at_once_give(num_samples: int, snip_edges: bool) -> None:
    samples = (np.random.default_rng(num_samples).normal(size=num_samples) * 3000).astype(np.float32)
    expected_TD = of_all_at_once(samples, snip_edges=snip_edges)
    found_TD = Fbank(normalize="none", snip_edges=snip_edges).compute(samples)
    assert found_TD.tobytes() == expected_TD.tobytes()
    assert len(found_TD) == Fbank(snip_edges=snip_edges).num_frames(num_samples)
