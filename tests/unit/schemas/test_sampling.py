"""Samples: the generator, what the draws depend on, and that they are unbiased."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from softlabel_schemas import InputError, SoftTargets
from softlabel_schemas.codec import build_codec
from softlabel_schemas.sampling import frame_streams, philox, sampled
from softlabel_schemas.selection import HeadAndSample, RandomSampling, SampledSelection, TopK
from softlabel_schemas.targets import offsets_of
from tests.support.datasets import SPEC
from tests.support.targets import assert_same_targets, random_log_posterior, targets_from_dense

NUM_CLASSES = 30


def whole(log_posterior_TV: npt.NDArray[np.float32], temperatures: tuple[float, ...] = (1.0,)) -> SoftTargets:
    return targets_from_dense(log_posterior_TV, np.ones(log_posterior_TV.shape, dtype=bool), temperatures)


def dense(targets: SoftTargets) -> npt.NDArray[np.float64]:
    """Stored probabilities [T, V]."""
    probs_TV = np.zeros((targets.num_frames, targets.num_classes))
    probs_TV[np.repeat(np.arange(targets.num_frames), targets.counts_T), targets.class_ids] = np.exp(targets.log_probs)
    return probs_TV


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_generator_gives_the_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    """Those that its authors publish for Philox4x32-10."""
    assert [int(word) for word in philox(*(np.uint64(word) for word in [*counter, *key]))] == expected


@pytest.mark.parametrize("num_head", [0, 3, 29, 30, 40])
def test_the_documented_draws(num_head: int) -> None:
    """FORMAT.md, one draw at a time."""
    log_posterior_TV = random_log_posterior(np.random.default_rng(1), 4, NUM_CLASSES)
    selection = HeadAndSample(k=num_head, draws=9, seed=7) if num_head else RandomSampling(draws=9, seed=7)
    targets = whole(log_posterior_TV)
    found = sampled(targets, selection, "utt-ä").validate()
    expected_TV = np.zeros(log_posterior_TV.shape)
    for frame, (key0, key1, counter) in enumerate(frame_streams(7, "utt-ä", 4)):
        probs_V = np.exp(log_posterior_TV[frame].astype(np.float64))
        head = targets.frames(frame, frame + 1).class_ids[:num_head]
        expected_TV[frame, head] = probs_V[head]
        probs_V[head] = 0
        mass = probs_V.sum()
        for draw in range(9) if mass > 0 else ():
            words = philox(*(np.uint64(word) for word in (draw // 2, counter, 0, 0, key0, key1)))
            high, low = (int(word) for word in words[2 * (draw % 2) :][:2])
            uniform = ((high << 32 | low) >> 11) / 2**53
            drawn = int(np.argmax(np.cumsum(probs_V) > uniform * mass))
            expected_TV[frame, drawn] += (mass if num_head else 1) / 9
    np.testing.assert_allclose(dense(found), expected_TV, rtol=1e-6)
    np.testing.assert_array_equal(found.tail_mass, 0)


@pytest.mark.parametrize("selection", [RandomSampling(draws=6), HeadAndSample(k=2, draws=4)], ids=lambda s: s.policy)
def test_unbiased(selection: SampledSelection) -> None:
    """The mean of 4,000 samples of a posterior is the posterior, within what its variance allows."""
    num_samples = 4000
    log_posterior_V = random_log_posterior(np.random.default_rng(2), 1, NUM_CLASSES, scale=2.0)[0]
    probs_TV = dense(sampled(whole(np.tile(log_posterior_V, (num_samples, 1))), selection, "utt"))
    posterior_V = np.exp(log_posterior_V.astype(np.float64))
    mass = np.sort(posterior_V)[::-1][selection.num_head :].sum()
    deviation_V = np.sqrt(posterior_V * (mass - posterior_V).clip(0) / selection.draws)
    if selection.num_head:
        deviation_V[np.argsort(-posterior_V)[: selection.num_head]] = 0
    assert (np.abs(probs_TV.mean(axis=0) - posterior_V) <= 5 * deviation_V / np.sqrt(num_samples) + 1e-6).all()
    # Of classes that are drawn often enough to tell.
    often_V = deviation_V > 0.02
    np.testing.assert_allclose(probs_TV.std(axis=0)[often_V], deviation_V[often_V], rtol=0.15)


def test_draws_depend_on_seed_utterance_and_frame_alone() -> None:
    frame_V = random_log_posterior(np.random.default_rng(3), 1, NUM_CLASSES, scale=1.0)
    targets = whole(np.tile(frame_V, (5, 1)))

    def draw(of: SoftTargets = targets, utterance_id: str = "utt-1", seed: int = 0) -> SoftTargets:
        return sampled(of, RandomSampling(draws=12, seed=seed), utterance_id)

    assert_same_targets(draw(), draw())
    assert_same_targets(draw(targets.frames(0, 2)), draw().frames(0, 2))
    frames = {tuple(draw().frames(t, t + 1).class_ids) for t in range(5)}
    others = [draw(utterance_id="utt-2").class_ids, draw(seed=1).class_ids]
    assert len(frames) == 5
    assert not any(np.array_equal(draw().class_ids, other) for other in others)


def test_nothing_impossible_is_drawn() -> None:
    log_posterior_TV = np.full((2, NUM_CLASSES), -100.0, dtype=np.float32)
    log_posterior_TV[:, 11] = 0.0
    found = sampled(whole(log_posterior_TV), RandomSampling(draws=3), "utt").validate()
    assert (found.class_ids.tolist(), found.log_probs.tolist()) == ([11, 11], [0.0, 0.0])
    # Beyond the head there is nothing to draw from.
    found = sampled(whole(log_posterior_TV), HeadAndSample(k=1, draws=3), "utt").validate()
    assert found.class_ids.tolist() == [11, 11]


def test_a_frame_without_some_classes_is_not_sampled() -> None:
    log_posterior_TV = random_log_posterior(np.random.default_rng(0), 3, 5)
    is_kept_TV = np.array([[True] * 5, [False] * 5, [True] * 4 + [False]])
    targets = targets_from_dense(log_posterior_TV, is_kept_TV, (1.0,))
    with pytest.raises(InputError, match="utterance utt: frame 2 has 4 entries, a sample is drawn from all 5 classes"):
        sampled(targets, RandomSampling(draws=2), "utt")


def test_only_temperature_1_is_left_and_frames_without_entries_stay_empty() -> None:
    targets = whole(random_log_posterior(np.random.default_rng(4), 3, NUM_CLASSES), (1.0, 2.0))
    targets = targets.keep(np.repeat([True, False, True], NUM_CLASSES))
    found = sampled(targets, RandomSampling(draws=2), "utt").validate()
    assert found.temperatures == (1.0,)
    np.testing.assert_allclose(found.tail_mass[:, 0], [0, 1, 0], atol=1e-6)
    assert found.counts_T[1] == 0


@pytest.mark.parametrize(
    ("codec", "bound"),
    # |sqrt(count / draws) - sqrt(decoded)|; a sixteenth of a nat, halved, of the probability; none.
    [
        ("mtf-sqrt", lambda p: 2 * np.sqrt(p) / 384 + 1 / 384**2),
        ("packed-u8", lambda p: p / 31),
        ("packed-f32", lambda p: 0),
    ],
)
def test_what_codecs_make_of_counts(codec: str, bound: object) -> None:
    log_posterior_TV = random_log_posterior(np.random.default_rng(5), 200, NUM_CLASSES, scale=1.5)
    selection = RandomSampling(draws=50)
    targets = sampled(whole(log_posterior_TV), selection, "utt")
    changes = {"num_classes": NUM_CLASSES, "temperatures": (1.0,), "selection": selection, "codec": codec}
    own = build_codec(SPEC.model_copy(update=changes))
    found = own.decode(own.encode(targets, offsets_of([200])), offsets_of([200]))
    np.testing.assert_array_equal(found.class_ids, targets.class_ids)
    probs_E = np.exp(targets.log_probs.astype(np.float64))
    assert callable(bound)
    assert (np.abs(np.exp(found.log_probs.astype(np.float64)) - probs_E) <= bound(probs_E) + 1e-6).all()


def test_a_store_of_all_classes_is_what_is_sampled() -> None:
    """Ranked or not makes no difference: the classes are looked up in the order of their ids."""
    log_posterior_TV = random_log_posterior(np.random.default_rng(6), 3, NUM_CLASSES, scale=0.0)
    assert TopK(k=NUM_CLASSES).cap == whole(log_posterior_TV).counts_T[0]
    found = sampled(whole(log_posterior_TV), RandomSampling(draws=300), "utt")
    assert np.abs(dense(found) - 1 / NUM_CLASSES).max() < 0.06
