"""Codecs: round trips, the stated error bound, and streams of several utterances joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas.codec import STREAMS, PackedCodec, build_codec
from softlabel_schemas.selection import TopK
from softlabel_schemas.targets import SoftTargets, concatenate, offsets_of
from tests.support.datasets import SPEC
from tests.support.targets import assert_same_targets, assert_within_u8_bound, random_targets

NUM_CLASSES = 40
TEMPERATURES = (1.0, 2.0, 0.5)


def make_codec(
    *,
    lossy: bool,
    num_classes: int = NUM_CLASSES,
    max_entries: int = NUM_CLASSES,
    temperatures: tuple[float, ...] = TEMPERATURES,
    wide: bool = False,
) -> PackedCodec:
    return PackedCodec(
        lossy=lossy,
        num_classes=num_classes,
        max_entries=max_entries,
        temperatures=temperatures,
        count_dtype=np.dtype("<u2" if wide else "u1"),
        id_dtype=np.dtype("<u4" if wide else "<u2"),
    )


@st.composite
def some_targets(draw: st.DrawFn) -> SoftTargets:
    """Flat to very peaked posteriors: log-probabilities from 0 to about -200, tails from 0 to 1."""
    return random_targets(
        np.random.default_rng(draw(st.integers(0, 2**32))),
        num_frames=draw(st.integers(0, 12)),
        num_classes=NUM_CLASSES,
        max_entries=draw(st.sampled_from([0, 1, 5, NUM_CLASSES])),
        temperatures=TEMPERATURES,
        scale=draw(st.sampled_from([0.0, 1.0, 5.0, 30.0])),
    )


@given(some_targets(), st.booleans())
def test_packed_f32_loses_nothing(targets: SoftTargets, wide: bool) -> None:
    codec = make_codec(lossy=False, wide=wide)
    decoded = codec.decode(codec.encode(targets.validate()), targets.num_frames)
    assert_same_targets(decoded.validate(mass_tolerance=codec.mass_tolerance), targets)


@given(some_targets(), st.booleans())
def test_packed_u8_keeps_its_bound_and_its_mass(targets: SoftTargets, wide: bool) -> None:
    codec = make_codec(lossy=True, wide=wide)
    decoded = codec.decode(codec.encode(targets.validate()), targets.num_frames)
    assert_within_u8_bound(decoded.validate(mass_tolerance=codec.mass_tolerance), targets)


@given(some_targets(), st.booleans())
def test_a_decoded_value_encodes_to_itself(targets: SoftTargets, lossy: bool) -> None:
    codec = make_codec(lossy=lossy)
    streams = codec.encode(targets)
    assert codec.encode(codec.decode(streams, targets.num_frames)) == streams


def test_every_u8_code_is_a_fixed_point() -> None:
    codec = make_codec(lossy=True, num_classes=256, max_entries=255, temperatures=(1.0,))
    # A frame for each tail code; the first two hold an entry for each log-probability code, 255 and 1.
    tail_codes = np.arange(65_536, dtype="<u2")
    streams = {
        "counts": b"\xff\x01" + bytes(len(tail_codes) - 2),
        "class_ids": np.arange(256, dtype="<u2").tobytes(),
        "log_probs": bytes(range(256)),
        "tail_mass": tail_codes.tobytes(),
    }
    decoded = codec.decode(streams, len(tail_codes))
    np.testing.assert_array_equal(decoded.log_probs, -np.arange(256) / 16)
    np.testing.assert_allclose(decoded.tail_mass[:, 0], (np.arange(65_536) / 65_535) ** 2, rtol=1e-7)
    assert codec.encode(decoded) == streams
    # The content digest is over bits: a probability of 1 must not decode to -0.0.
    assert not np.signbit(decoded.log_probs[0])


@given(st.lists(some_targets(), min_size=1, max_size=4), st.booleans())
def test_joined_streams_decode_to_the_concatenation(parts: list[SoftTargets], lossy: bool) -> None:
    codec = make_codec(lossy=lossy)
    encoded = [codec.encode(part) for part in parts]
    joined = {stream: b"".join(streams[stream] for streams in encoded) for stream in STREAMS}
    one_by_one = [codec.decode(streams, part.num_frames) for streams, part in zip(encoded, parts, strict=True)]
    found = codec.decode(joined, sum(part.num_frames for part in parts))
    assert_same_targets(found, concatenate(one_by_one))


def test_a_tail_of_one_beside_an_entry_is_kept_below_one() -> None:
    codec = make_codec(lossy=True, temperatures=(1.0,))
    targets = SoftTargets(
        num_classes=NUM_CLASSES,
        temperatures=(1.0,),
        offsets=offsets_of([1, 0]),
        class_ids=np.array([7], dtype=np.int32),
        log_probs=np.array([-14.0], dtype=np.float32),
        tail_mass=np.array([[1 - np.exp(-14.0)], [1.0]], dtype=np.float32),
    )
    decoded = codec.decode(codec.encode(targets.validate()), 2)
    assert decoded.tail_mass[0, 0] < 1
    assert decoded.tail_mass[1, 0] == 1
    assert_within_u8_bound(decoded, targets)


@pytest.mark.parametrize(
    ("max_entries", "num_classes", "count_dtype", "id_dtype"),
    [(255, 65_536, "u1", "<u2"), (256, 65_537, "<u2", "<u4"), (65_534, 200, "u1", "<u2")],
)
def test_integers_are_as_wide_as_the_spec_needs(
    max_entries: int, num_classes: int, count_dtype: str, id_dtype: str
) -> None:
    spec = SPEC.model_copy(update={"selection": TopK(k=max_entries), "num_classes": num_classes})
    codec = build_codec(spec)
    assert (codec.count_dtype, codec.id_dtype) == (np.dtype(count_dtype), np.dtype(id_dtype))
    targets = random_targets(
        np.random.default_rng(0),
        num_frames=3,
        num_classes=num_classes,
        max_entries=max_entries,
        temperatures=spec.temperatures,
        scale=1.0,
    )
    highest = replace(targets, class_ids=targets.class_ids.copy())
    highest.class_ids[:1] = num_classes - 1
    np.testing.assert_array_equal(codec.decode(codec.encode(highest), 3).class_ids, highest.class_ids)


def test_more_entries_than_the_selection_allows_raise() -> None:
    targets = random_targets(np.random.default_rng(0), num_classes=600, max_entries=600, temperatures=TEMPERATURES)
    highest = int(targets.counts_T.max())
    assert highest > 255
    codec = make_codec(lossy=True, num_classes=600, max_entries=highest, wide=True)
    streams = codec.encode(targets)
    assert_within_u8_bound(codec.decode(streams, targets.num_frames), targets)
    narrower = replace(codec, max_entries=highest - 1)
    message = f"a frame has {highest} entries, the selection allows {highest - 1}"
    with pytest.raises(ValueError, match=message):
        narrower.encode(targets)
    with pytest.raises(ValueError, match=message):
        narrower.decode(streams, targets.num_frames)


@pytest.mark.parametrize(
    "codec", [make_codec(lossy=True, num_classes=41), make_codec(lossy=True, temperatures=(1.0, 2.0))]
)
def test_targets_of_another_dataset_raise(codec: PackedCodec) -> None:
    targets = random_targets(np.random.default_rng(0), num_classes=NUM_CLASSES, temperatures=TEMPERATURES)
    with pytest.raises(ValueError, match=r"targets have 40 classes at temperatures \(1.0, 2.0, 0.5\), the dataset"):
        codec.encode(targets)


@pytest.mark.parametrize("lossy", [True, False])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"], ids=["shorter", "longer"])
def test_a_stream_of_another_length_raises(lossy: bool, stream: str, change: Callable[[bytes], bytes]) -> None:
    targets = random_targets(np.random.default_rng(0), num_classes=NUM_CLASSES, temperatures=TEMPERATURES)
    codec = make_codec(lossy=lossy)
    streams = codec.encode(targets)
    streams[stream] = change(streams[stream])
    with pytest.raises(ValueError, match=f"stream '{stream}' has .* bytes, expected"):
        codec.decode(streams, targets.num_frames)
