"""Temperatures that a codec cannot tell are refused; those that it is trusted with, it tells."""

from __future__ import annotations

import numpy as np
import pytest

from softlabel_schemas.codec import build_codec
from softlabel_schemas.errors import InputError
from softlabel_schemas.floors import FLOORS
from softlabel_schemas.mtf_sqrt import LOG_PROB_OF
from softlabel_schemas.narrowing import narrow
from softlabel_schemas.selection import AnySelection, ByteBudget, Mass, Threshold, TopK
from softlabel_schemas.spec import CodecName
from softlabel_schemas.targets import SoftTargets, offsets_of
from softlabel_schemas.tempering import check_tempered, obstacle, warn_of_floor
from tests.support.datasets import CODECS, SPEC

NUM_CLASSES = 640


def decoded(targets: SoftTargets, selection: AnySelection, codec_name: CodecName) -> SoftTargets:
    update = {
        "codec": codec_name,
        "num_classes": targets.num_classes,
        "temperatures": targets.temperatures,
        "selection": selection,
    }
    codec = build_codec(SPEC.model_copy(update=update))
    frame_offsets = np.array([0, targets.num_frames])
    return codec.decode(codec.encode(targets, frame_offsets), frame_offsets)


def one_sure_class(num_entries: int, temperature: float) -> tuple[SoftTargets, float]:
    """Stored ``num_entries`` of a posterior whose other classes have 1e-13 each; and its first class at ``temperature``."""
    log_probs_V = np.full(NUM_CLASSES, np.log(1e-13))
    log_probs_V[0] = np.log1p(-1e-13 * (NUM_CLASSES - 1))
    tempered_V = np.exp(log_probs_V / temperature)
    tempered_V /= tempered_V.sum()
    tails = [[np.exp(log_probs_V[num_entries:]).sum(), tempered_V[num_entries:].sum()]]
    targets = SoftTargets(
        num_classes=NUM_CLASSES,
        temperatures=(1.0, temperature),
        offsets=offsets_of([num_entries]),
        class_ids=np.arange(num_entries, dtype=np.int32),
        log_probs=log_probs_V[:num_entries].astype(np.float32),
        tail_mass=np.array(tails, dtype=np.float32),
    )
    return targets, float(tempered_V[0])


def test_the_floors_are_the_codecs() -> None:
    targets, _ = one_sure_class(NUM_CLASSES, 2.0)
    lossy = {name: FLOORS[name] for name in CODECS if name != "packed-f32"}
    for name, floor in lossy.items():
        found = decoded(targets, TopK(k=NUM_CLASSES), name).log_probs[1:]
        np.testing.assert_allclose(found, np.log(floor.prob), rtol=1e-6)
    assert FLOORS["mtf-sqrt"].prob == pytest.approx(np.exp(LOG_PROB_OF[0]), rel=1e-6)
    for name, floor in lossy.items():
        for scale, is_floor in ((0.98, True), (1.02, False)):
            small = float(np.log(floor.below * scale))
            two = SoftTargets(
                num_classes=NUM_CLASSES,
                temperatures=(1.0, 2.0),
                offsets=offsets_of([2]),
                class_ids=np.arange(2, dtype=np.int32),
                log_probs=np.array([np.log1p(-np.exp(small)), small], np.float32),
                tail_mass=np.full((1, 2), floor.tail * scale, np.float32),
            )
            found_two = decoded(two, TopK(k=2), name)
            assert (np.exp(found_two.log_probs[1]) == pytest.approx(floor.prob, rel=1e-5)) == is_floor
            assert (found_two.tail_mass[0, 0] == 0) == is_floor


@pytest.mark.parametrize("temperature", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("num_entries", [1, 2, 5, 20, 50, 76, 150, 640])
@pytest.mark.parametrize("codec", ["mtf-sqrt", "packed-u8", "packed-f32"])
def test_what_is_not_refused_is_right_at_its_worst(codec: CodecName, num_entries: int, temperature: float) -> None:
    """And what is refused may be wrong by more than that."""
    selection = TopK(k=num_entries)
    targets, expected = one_sure_class(num_entries, temperature)
    found = np.exp(decoded(targets, selection, codec).at_temperature(temperature)[0][0])
    refused = obstacle(selection, codec, temperature, NUM_CLASSES) is not None
    error = abs(found - expected)
    assert error > 0.08 if refused else error < 0.1


def test_a_mass_or_a_threshold_keeps_nothing_so_small() -> None:
    for selection in (
        Mass(mass=0.95, max_entries=200),
        Threshold(min_prob=1e-4, max_entries=200),
        Mass(mass=0.95, max_entries=200, keep_hard_label=True),
    ):
        assert obstacle(selection, "mtf-sqrt", 2.0, NUM_CLASSES) is None
    for selection in (
        TopK(k=200),
        ByteBudget(bytes_per_frame=8, max_entries=200),
        Mass(mass=1.0, max_entries=200),
        Threshold(min_prob=1e-6, max_entries=200),
    ):
        assert obstacle(selection, "mtf-sqrt", 2.0, NUM_CLASSES) is not None
        assert obstacle(selection, "mtf-sqrt", 1.0, NUM_CLASSES) is None
        assert obstacle(selection, "packed-f32", 2.0, NUM_CLASSES) is None


@pytest.mark.parametrize(("codec", "num_classes"), [("mtf-sqrt", 5_000), ("mtf-sqrt", 6_000), ("packed-u8", 65_534)])
def test_what_the_floor_adds_to_a_narrowed_tail_is_warned_of(
    codec: CodecName, num_classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a frame whose likeliest class has all, its tail is next to none; from 0.01 on it is said."""
    log_probs_V = np.full(num_classes, np.log(1e-13), np.float32)
    log_probs_V[0] = 0
    whole = SoftTargets(
        num_classes=num_classes,
        temperatures=(1.0,),
        offsets=offsets_of([num_classes]),
        class_ids=np.arange(num_classes, dtype=np.int32),
        log_probs=log_probs_V,
        tail_mass=np.zeros((1, 1), np.float32),
    )
    update = {"codec": codec, "num_classes": num_classes, "selection": TopK(k=num_classes)}
    spec = SPEC.model_copy(update=update)
    narrowed = narrow(decoded(whole, spec.selection, codec), spec, TopK(k=20), utterance_id="utt")
    assert narrowed.tail_mass[0, 0] == pytest.approx((num_classes - 20) * FLOORS[codec].prob, rel=1e-4)
    warn_of_floor(spec, where="team/labels")
    said = capsys.readouterr().err
    assert bool(said) == (narrowed.tail_mass[0, 0] >= 0.01)
    if said:
        assert said.startswith(
            "warning: team/labels: codec 'mtf-sqrt' stores every probability below 6.8e-06 as 1.7e-06; 5,999 such entries of a "
            "frame add up to 0.01, "
        )
        assert said.endswith('label with targets.codec = "packed-u8" or "packed-f32"\n')


def test_the_message_says_what_to_do() -> None:
    spec = SPEC.model_copy(update={"codec": "mtf-sqrt", "num_classes": NUM_CLASSES, "selection": TopK(k=NUM_CLASSES)})
    with pytest.raises(
        InputError,
        match=r"^team/labels: temperature 2 is asked for, but codec \'mtf-sqrt\' stores every probability below 6.8e-06 as "
        r"1.7e-06; at temperature 2 639 such entries .* 0.0013 each, .*; use temperature 1, or label with "
        r'targets.codec = "packed-f32"',
    ):
        check_tempered(spec, 2.0, where="team/labels")
