"""Capturing widely and narrowing is capturing narrowly, for every pair that can be derived."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from softlabel_schemas import InputError, Utterance
from softlabel_schemas.frame_selection import FrameSelection
from softlabel_schemas.narrowing import check_derivable, narrow
from softlabel_schemas.sampling import frame_streams
from softlabel_schemas.selection import (
    NO_LABEL,
    AnySelection,
    ByteBudget,
    HeadAndSample,
    Mass,
    RandomSampling,
    Threshold,
    TopK,
    check_sampled_temperatures,
)
from softlabel_schemas.shard import LabelledUtterance
from softlabel_schemas.spec import DatasetSpec
from teacher_service.capture import capture, fits
from teacher_service.capture_cpu import select_cpu
from teacher_service.ensemble import combine
from teacher_service.utterance_labels import Outputs, label_outputs
from tests.support.datasets import SPEC
from tests.support.targets import dense_posterior

NUM_CLASSES, NUM_FRAMES = 12, [5, 0, 3]
SILENCE_V = np.arange(NUM_CLASSES) < 3

dropped = st.sampled_from([0.0, 1.0])
frames = st.one_of(
    st.none(),
    st.builds(dict, disagreeing=dropped, uncertain=dropped, silence=dropped, min_top1=st.sampled_from([0.3, 0.5]))
    .filter(lambda weights: 0 in (weights["disagreeing"], weights["uncertain"], weights["silence"]))
    .map(FrameSelection.model_validate),
)
caps, seeds = st.integers(1, NUM_CLASSES + 1), st.integers(0, 2**32 - 1)
probabilities = st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
keeps = st.booleans()
wide = st.builds(TopK, k=st.just(NUM_CLASSES), frames=frames)
policies = (
    st.builds(TopK, k=caps, keep_hard_label=keeps, frames=frames),
    st.builds(Mass, mass=probabilities, max_entries=caps, keep_hard_label=keeps, frames=frames),
    st.builds(Threshold, min_prob=probabilities, max_entries=caps, keep_hard_label=keeps, frames=frames),
    st.builds(ByteBudget, bytes_per_frame=st.sampled_from([3, 6.5, 10]), max_entries=st.just(8), frames=frames),
    st.builds(RandomSampling, draws=st.integers(1, 20), seed=st.integers(0, 3), frames=frames),
    st.builds(HeadAndSample, k=caps, draws=st.integers(1, 9), frames=frames),
)
# Of the same policy, or all classes: others can rarely be derived.
pairs = st.one_of(
    *(st.tuples(st.one_of(wide, policy), policy) for policy in policies), st.tuples(policies[0], st.one_of(*policies))
)


def capture_all(
    selection: AnySelection, logits: list[torch.Tensor], labels: list[np.ndarray], temperatures: tuple[float, ...]
) -> tuple[DatasetSpec, list[LabelledUtterance]]:
    """The utterances that have frames, as the service labels them."""
    changes = {
        "num_classes": NUM_CLASSES,
        "selection": selection,
        "codec": "packed-f32",
        "temperatures": temperatures,
    }
    spec = DatasetSpec.model_validate(SPEC.model_dump() | changes)
    rows = [
        Utterance(
            utterance_id=f"utt-{index}", audio="a.wav", sample_rate=1, num_samples=1, split="a", hard_labels=labels_T
        )
        for index, labels_T in enumerate(labels)
    ]
    lengths = [torch.tensor(NUM_FRAMES)] * len(logits)
    outputs = Outputs(indices=[0, 1, 2], logits=[each.clone() for each in logits], lengths=lengths)
    found = label_outputs(rows, outputs, ["a", "b"], [0.25, 0.75], spec, SILENCE_V)
    return spec, [each for each in found.values() if isinstance(each, LabelledUtterance)]


def random_case(seed: int, scale: float) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    # Few different logits: equal probabilities are frequent.
    logits = [torch.from_numpy(scale * rng.integers(0, 4, (3, 6, NUM_CLASSES)).astype(np.float32)) for _ in range(2)]
    return logits, [rng.integers(NO_LABEL, NUM_CLASSES, count).astype(np.int32) for count in NUM_FRAMES]


@settings(max_examples=200, suppress_health_check=[HealthCheck.filter_too_much])
@given(seed=seeds, scale=st.sampled_from([0.0, 1.0, 3.0]), pair=pairs)
def test_narrowing_what_was_captured_equals_capturing_less(
    seed: int, scale: float, pair: tuple[AnySelection, AnySelection]
) -> None:
    stored, wanted = pair
    try:
        check_derivable(stored, wanted, num_classes=NUM_CLASSES)
    except InputError:
        assume(False)
    temperatures = (1.0,) if isinstance(wanted, RandomSampling | HeadAndSample) else (1.0, 2.0)
    logits, labels = random_case(seed, scale)
    spec, captured = capture_all(stored, logits, labels, temperatures)
    _, expected = capture_all(wanted, logits, labels, temperatures)
    assert [each.utterance_id for each in captured] == ["utt-0", "utt-2"]
    for own, other in zip(captured, expected, strict=True):
        labels_T = labels[int(own.utterance_id[-1])]
        of_utterance = {"utterance_id": own.utterance_id, "hard_labels_T": labels_T, "silence_V": SILENCE_V}
        found = narrow(own.targets.validate(), spec, wanted, **of_utterance).validate()
        np.testing.assert_array_equal(found.offsets, other.targets.offsets)
        np.testing.assert_array_equal(found.class_ids, other.targets.class_ids)
        np.testing.assert_array_equal(found.log_probs, other.targets.log_probs)
        np.testing.assert_allclose(found.tail_mass, other.targets.tail_mass, atol=1e-5, rtol=0)


@pytest.mark.parametrize("selection", [RandomSampling(draws=3), HeadAndSample(k=1, draws=2)], ids=lambda s: s.policy)
def test_statistics_are_of_the_posterior_and_not_of_the_sample(selection: AnySelection) -> None:
    """And of all frames, those that are dropped too; only the kept mass is of what is stored."""
    logits, labels = random_case(1, 1.0)
    rules = FrameSelection(uncertain=0, min_top1=0.3)
    _, plain = capture_all(TopK(k=3), logits, labels, (1.0,))
    _, found = capture_all(selection, logits, labels, (1.0,))
    _, fewer = capture_all(selection.model_copy(update={"frames": rules}), logits, labels, (1.0,))
    for of_prefix, of_sample, of_fewer in zip(plain, found, fewer, strict=True):
        for other in (of_sample, of_fewer):
            assert other.stats.entropy == pytest.approx(of_prefix.stats.entropy, rel=1e-5)
            assert other.stats.agreement == pytest.approx(of_prefix.stats.agreement, nan_ok=True)
        assert of_sample.stats.kept_mass == pytest.approx(1, abs=1e-6)
        kept_T = of_fewer.targets.counts_T > 0
        assert of_fewer.stats.kept_mass == pytest.approx(kept_T.mean(), abs=1e-6)
        # By the posterior's likeliest class, whatever was drawn.
        index = int(of_fewer.utterance_id[-1])
        posterior_TV = sum(
            weight * dense_posterior(each[index, : NUM_FRAMES[index]].numpy(), 1.0)
            for weight, each in zip((0.25, 0.75), logits, strict=True)
        )
        np.testing.assert_array_equal(kept_T, np.asarray(posterior_TV).max(axis=1) >= 0.3)
        np.testing.assert_array_equal(of_fewer.targets.tail_mass[~kept_T], 1)


def test_a_posterior_that_is_not_finite_is_an_error_of_its_utterance() -> None:
    logits, labels = random_case(2, 1.0)
    logits[0][2, 1, 4] = torch.nan
    for selection in (
        RandomSampling(draws=3),
        HeadAndSample(k=2, draws=3),
        ByteBudget(bytes_per_frame=4, max_entries=3),
    ):
        _, found = capture_all(selection, logits, labels, (1.0,))
        assert [each.utterance_id for each in found] == ["utt-0"]


@pytest.mark.parametrize("method", ["arithmetic", "log_linear"])
def test_the_posterior_of_another_device_gives_the_same_draws(method: Any) -> None:
    """It is combined in torch, with other last bits; only a draw at the very border of two classes could differ."""
    torch.manual_seed(0)
    logits, selection = [2 * torch.randn(1, 200, 300) for _ in range(2)], RandomSampling(draws=20)
    none_N, streams_NW = torch.full((200,), NO_LABEL), frame_streams(0, "utt", 200)
    found = capture(logits, [200], [0.25, 0.75], method, selection, (1.0,), none_N, streams_NW)
    other = select_cpu(combine(logits, [0.25, 0.75], method)[0], selection, (1.0,), none_N, streams_NW)
    probs_NK, other_NK = (torch.where(each.kept_NK, each.log_probs_NK.exp(), 0) for each in (found, other))
    assert ((probs_NK == other_NK).all(dim=1)).float().mean() > 0.98
    assert (
        torch.where(found.kept_NK & other.kept_NK, found.ids_NK == other.ids_NK, True).all(dim=1)
    ).float().mean() > 0.98
    assert torch.equal(found.top1_N, other.top1_N)
    torch.testing.assert_close(found.entropy_N, other.entropy_N)


def test_the_kernel_takes_prefixes_alone() -> None:
    assert fits(TopK(k=8), 100)
    assert not fits(RandomSampling(draws=8), 100)
    assert not fits(HeadAndSample(k=1, draws=8), 100)


@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (2.0,)])
def test_temperatures_of_samples(temperatures: tuple[float, ...]) -> None:
    check_sampled_temperatures(TopK(k=1), temperatures)
    with pytest.raises(ValueError, match="drawn at temperature 1 and gives no other"):
        check_sampled_temperatures(RandomSampling(draws=1), temperatures)
