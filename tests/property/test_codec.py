"""Codecs: round trips, the stated error bounds, utterances that stand for themselves, and streams that fit nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from softlabel_schemas.codec import Codec, build_codec, check_encodable
from softlabel_schemas.mtf_sqrt import LOG_PROB_OF, PREDICTED, TAIL_OF, tail_codes
from softlabel_schemas.selection import TopK
from softlabel_schemas.spec import CodecName
from softlabel_schemas.streams import Streams
from softlabel_schemas.targets import RAW_MASS_TOLERANCE, SoftTargets, concatenate, offsets_of
from tests.support.datasets import CODECS, SPEC
from tests.support.targets import assert_same_targets, assert_within_bound, random_targets

NUM_CLASSES = 40
TEMPERATURES = (1.0, 2.0, 0.5)


def make_codec(
    name: CodecName,
    *,
    num_classes: int = NUM_CLASSES,
    max_entries: int = NUM_CLASSES,
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> Codec:
    return build_codec(
        SPEC.model_copy(
            update={
                "codec": name,
                "num_classes": num_classes,
                "selection": TopK(k=max_entries),
                "temperatures": temperatures,
            }
        )
    )


def round_trip(codec: Codec, *parts: SoftTargets) -> SoftTargets:
    """The utterances ``parts``, encoded and decoded together."""
    frame_offsets = offsets_of([part.num_frames for part in parts])
    return codec.decode(codec.encode(concatenate(parts), frame_offsets), frame_offsets)


def as_bytes(streams: Streams) -> dict[str, tuple[bytes, list[int]]]:
    return {name: (bytes(data), offsets.tolist()) for name, (data, offsets) in streams.items()}


@st.composite
def some_targets(draw: st.DrawFn, num_classes: int = NUM_CLASSES) -> SoftTargets:
    """Flat to very peaked posteriors: log-probabilities from 0 to about -200, tails from 0 to 1."""
    return random_targets(
        np.random.default_rng(draw(st.integers(0, 2**32))),
        num_frames=draw(st.integers(0, 12)),
        num_classes=num_classes,
        max_entries=draw(st.sampled_from([0, 1, 5, 20, num_classes])),
        temperatures=TEMPERATURES,
        scale=draw(st.sampled_from([0.0, 1.0, 5.0, 30.0])),
        slowness=draw(st.sampled_from([0.0, 0.9])),
    )


@pytest.mark.parametrize("name", CODECS)
@given(parts=st.lists(some_targets(), min_size=1, max_size=4))
def test_a_round_trip_keeps_the_stated_bound(name: CodecName, parts: list[SoftTargets]) -> None:
    codec = make_codec(name)
    found = round_trip(codec, *parts).validate(mass_tolerance=codec.mass_tolerance)
    assert_within_bound(name, found, concatenate(parts))


@pytest.mark.parametrize("name", CODECS)
@given(targets=some_targets())
def test_a_decoded_value_encodes_to_itself(name: CodecName, targets: SoftTargets) -> None:
    codec = make_codec(name)
    once = round_trip(codec, targets)
    # What a writer insists on.
    assume((np.abs(once.kept_mass_T() + once.tail_mass[:, 0] - 1) <= RAW_MASS_TOLERANCE).all())
    assert_same_targets(round_trip(codec, once), once)


@pytest.mark.parametrize("name", CODECS)
@given(parts=st.lists(some_targets(), min_size=2, max_size=4))
def test_every_utterance_stands_for_itself(name: CodecName, parts: list[SoftTargets]) -> None:
    codec = make_codec(name)
    assert_same_targets(round_trip(codec, *parts), concatenate([round_trip(codec, part) for part in parts]))


@pytest.mark.parametrize("code", range(256))
def test_a_log_probability_of_packed_u8_is_its_code_in_sixteenths(code: int) -> None:
    codec = make_codec("packed-u8", temperatures=(1.0,))
    tail = np.rint(np.sqrt(1 - math.exp(-code / 16)) * 65_535).astype("<u2")
    data = {"counts": b"\1", "class_ids": b"\7\0", "log_probs": bytes([code]), "tail_mass": tail.tobytes()}
    streams = {name: (memoryview(each), offsets_of([len(each)])) for name, each in data.items()}
    decoded = codec.decode(streams, offsets_of([1]))
    assert decoded.log_probs.tolist() == [-code / 16]
    # The content digest is over bits: a probability of 1 must not decode to -0.0.
    assert not np.signbit(decoded.log_probs[0]) or code
    assert decoded.tail_mass.tolist() == [[np.float32((int(tail) / 65_535) ** 2)]]


def test_the_tables_of_mtf_sqrt_are_the_specified_ones() -> None:
    codes = np.arange(193)
    roots = np.where(codes == 0, 0.25, codes) / 192
    np.testing.assert_array_equal(LOG_PROB_OF, (2 * np.log(roots)).astype(np.float32))
    # The content digest is over bits: a probability of 1 must not decode to -0.0.
    assert not np.signbit(LOG_PROB_OF[192])
    np.testing.assert_array_equal(TAIL_OF, (np.sin(np.arange(256) * math.pi / 510) ** 2).astype(np.float32))
    assert (TAIL_OF[0], TAIL_OF[255]) == (0, 1)
    np.testing.assert_array_equal(tail_codes(TAIL_OF), np.arange(256))


def test_the_tables_of_mtf_sqrt_do_not_hang_on_the_last_bit() -> None:
    """No entry is so near to where it would round otherwise that another mathematical library could differ."""
    exact = np.arcsin(np.sqrt(np.arange(192**2 + 1) / 192**2)) * (510 / math.pi) + 0.3
    assert np.abs(exact - np.rint(exact)).min() > 1e-7
    np.testing.assert_array_equal(PREDICTED, np.floor(exact))
    values = 2 * np.log(np.arange(1, 192) / 192)
    halves = np.abs(values - LOG_PROB_OF[1:192]) - np.spacing(LOG_PROB_OF[1:192]).astype(np.float64) / 2
    assert np.abs(halves).min() > 1e-13


@pytest.mark.parametrize("name", CODECS)
def test_a_tail_of_one_beside_an_entry_is_kept_below_one(name: CodecName) -> None:
    codec = make_codec(name, temperatures=(1.0,))
    targets = SoftTargets(
        num_classes=NUM_CLASSES,
        temperatures=(1.0,),
        offsets=offsets_of([1, 0]),
        class_ids=np.array([7], dtype=np.int32),
        log_probs=np.array([-14.0], dtype=np.float32),
        tail_mass=np.array([[1 - np.exp(-14.0)], [1.0]], dtype=np.float32),
    )
    decoded = round_trip(codec, targets)
    assert decoded.tail_mass[0, 0] < 1
    assert decoded.tail_mass[1, 0] == 1
    assert_within_bound(name, decoded, targets)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    ("max_entries", "num_classes"),
    [(255, 65_536), (256, 65_537), (65_534, 200), (20, 768), (20, 769), (20, 66_048), (20, 66_049), (3, 2_000_000)],
)
def test_integers_are_as_wide_as_the_spec_needs(name: CodecName, max_entries: int, num_classes: int) -> None:
    codec = make_codec(name, num_classes=num_classes, max_entries=max_entries)
    targets = random_targets(
        np.random.default_rng(0),
        num_frames=3,
        num_classes=min(num_classes, 70_000),
        max_entries=max_entries,
        temperatures=TEMPERATURES,
        scale=1.0,
    )
    # The ids of each frame become the highest there are.
    targets = replace(targets, num_classes=num_classes, class_ids=num_classes - 1 - targets.class_ids)
    assert_within_bound(name, round_trip(codec, targets), targets)


@pytest.mark.parametrize("name", CODECS)
def test_more_entries_than_the_selection_allows_raise(name: CodecName) -> None:
    targets = random_targets(np.random.default_rng(0), num_classes=600, max_entries=600, temperatures=TEMPERATURES)
    highest = int(targets.counts_T.max())
    assert highest > 255
    codec, frames = make_codec(name, num_classes=600, max_entries=highest), offsets_of([targets.num_frames])
    streams = codec.encode(targets, frames)
    assert_within_bound(name, codec.decode(streams, frames), targets)
    narrower = make_codec(name, num_classes=600, max_entries=highest - 1)
    message = f"a frame has {highest} entries, the selection allows {highest - 1}"
    with pytest.raises(ValueError, match=message):
        check_encodable(targets, narrower)
    with pytest.raises(ValueError, match=message):
        narrower.decode(streams, frames)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("other", [{"num_classes": 41}, {"temperatures": (1.0, 2.0)}])
def test_targets_of_another_dataset_raise(name: CodecName, other: dict[str, object]) -> None:
    targets = random_targets(np.random.default_rng(0), num_classes=NUM_CLASSES, temperatures=TEMPERATURES)
    with pytest.raises(ValueError, match=r"targets have 40 classes at temperatures \(1.0, 2.0, 0.5\), the dataset"):
        check_encodable(targets, make_codec(name, **other))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "change",
    [
        lambda targets: targets.class_ids.__setitem__(0, NUM_CLASSES),
        lambda targets: targets.class_ids.__setitem__(0, -1),
        lambda targets: targets.class_ids.__setitem__(1, targets.class_ids[0]),
        lambda targets: targets.log_probs.__setitem__(0, 0.5),
        lambda targets: targets.log_probs.__setitem__(0, np.nan),
        lambda targets: targets.log_probs.__setitem__(1, targets.log_probs[0] + 0.1),
        lambda targets: targets.log_probs.__setitem__(1, -np.inf),
        lambda targets: targets.tail_mass.__setitem__((0, 1), 1.5),
        lambda targets: targets.tail_mass.__setitem__((0, 1), np.nan),
        lambda targets: targets.tail_mass.__setitem__((0, 0), 0.9),
    ],
)
def test_targets_that_break_an_invariant_are_not_encoded(
    name: CodecName, change: Callable[[SoftTargets], None]
) -> None:
    rng = np.random.default_rng(3)
    targets = random_targets(rng, num_classes=NUM_CLASSES, temperatures=TEMPERATURES, scale=1.0)
    targets = targets.frames(int(np.flatnonzero(targets.counts_T >= 3)[0]), targets.num_frames)
    targets = replace(
        targets,
        class_ids=targets.class_ids.copy(),
        log_probs=targets.log_probs.copy(),
        tail_mass=targets.tail_mass.copy(),
    )
    change(targets)
    with pytest.raises(ValueError, match=r"frame 0|class id 40|class id is negative"):
        make_codec(name).encode(targets, offsets_of([targets.num_frames]))


@pytest.mark.parametrize(("name", "stream"), [(name, stream) for name in CODECS for stream in make_codec(name).streams])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"], ids=["shorter", "longer"])
def test_a_stream_of_another_length_raises(name: CodecName, stream: str, change: Callable[[bytes], bytes]) -> None:
    codec = make_codec(name, num_classes=900, max_entries=40)
    targets = random_targets(
        np.random.default_rng(0), num_classes=900, max_entries=40, temperatures=TEMPERATURES, slowness=0.9
    )
    frames = offsets_of([targets.num_frames])
    streams = codec.encode(targets, frames)
    assert len(streams[stream][0])
    changed = change(bytes(streams[stream][0]))
    streams[stream] = (memoryview(changed), offsets_of([len(changed)]))
    with pytest.raises(ValueError, match=r"stream|frame"):
        codec.decode(streams, frames)


def test_offsets_that_do_not_cut_the_streams_raise() -> None:
    codec = make_codec("mtf-sqrt")
    targets = random_targets(np.random.default_rng(0), num_classes=NUM_CLASSES, temperatures=TEMPERATURES)
    frames = offsets_of([targets.num_frames])
    for wrong in ([0, 1], [1, targets.num_frames], [0, 5, targets.num_frames]):
        streams = codec.encode(targets, frames)
        streams["counts"] = (streams["counts"][0], np.array(wrong))
        with pytest.raises(ValueError, match=r"stream 'counts' of .* is not cut into 1 utterances"):
            codec.decode(streams, frames)
    with pytest.raises(ValueError, match="streams are"):
        codec.decode({}, frames)
