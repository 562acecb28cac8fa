"""The benchmark of random access, at small size: its figures exist and are plausible."""

from __future__ import annotations

from tests.benchmarks.random_access import figures


def test_the_figures() -> None:
    found = {figure.name: figure for figure in figures(num_shards=4, num_utterances=130, num_frames=8, repeats=1)}
    counts = [figure for figure in found.values() if figure.unit == "requests"]
    times = [figure for figure in found.values() if figure.unit == "ms"]
    assert (len(counts), len(times)) == (2, 4)
    assert all(figure.met for figure in counts)
    assert all(figure.value > 0 and figure.ratio for figure in times)
    # Entries of 40 bytes in a bucket, and a key of 8 in base64.
    assert 50 < found["index"].value < 60
    assert 0 < found["index, utterances of 8 frames"].value < 8
