"""Random valid soft targets with true tails, from whole posteriors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from softlabel_schemas.targets import SoftTargets, offsets_of

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


def random_log_posterior(
    rng: np.random.Generator, num_frames: int, num_classes: int, scale: float = 3.0, slowness: float = 0.0
) -> Float32:
    """Log-posterior float32 [T, V]; a larger ``scale`` makes it more peaked, 0 makes it uniform."""
    logits_TV = scale * rng.standard_normal((num_frames, num_classes))
    for frame in range(1, num_frames) if slowness else ():
        logits_TV[frame] = slowness * logits_TV[frame - 1] + np.sqrt(1 - slowness**2) * logits_TV[frame]
    return np.log(dense_posterior(logits_TV, 1.0)).astype(np.float32)


def dense_posterior(log_posterior_TV: npt.NDArray[np.floating], temperature: float) -> Float64:
    """softmax(log_posterior / temperature), float64 [T, V]."""
    scaled_TV = log_posterior_TV.astype(np.float64) / temperature
    exp_TV = np.exp(scaled_TV - scaled_TV.max(axis=1, keepdims=True))
    return exp_TV / exp_TV.sum(axis=1, keepdims=True)


def ranking(log_posterior_TV: Float32) -> npt.NDArray[np.int64]:
    """Class ids by falling probability, ties by rising id, int64 [T, V]."""
    return np.argsort(-log_posterior_TV, axis=1, kind="stable")


def targets_from_dense(log_posterior_TV: Float32, kept_TV: Bool, temperatures: tuple[float, ...]) -> SoftTargets:
    """The entries where ``kept_TV`` is true, and at each temperature the mass of all others."""
    ranked_TV = ranking(log_posterior_TV)
    ranked_kept_TV = np.take_along_axis(kept_TV, ranked_TV, axis=1)
    tails = [(dense_posterior(log_posterior_TV, t) * ~kept_TV).sum(axis=1) for t in temperatures]
    return SoftTargets(
        num_classes=log_posterior_TV.shape[1],
        temperatures=temperatures,
        offsets=offsets_of(kept_TV.sum(axis=1)),
        class_ids=ranked_TV[ranked_kept_TV].astype(np.int32),
        log_probs=np.take_along_axis(log_posterior_TV, ranked_TV, axis=1)[ranked_kept_TV],
        tail_mass=np.clip(np.stack(tails, axis=1), 0, 1).astype(np.float32),
    )


def random_targets(
    rng: np.random.Generator,
    *,
    num_frames: int = 20,
    num_classes: int = 50,
    max_entries: int = 8,
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0),
    scale: float = 3.0,
    slowness: float = 0.0,
) -> SoftTargets:
    """Each frame keeps its 0 to ``max_entries`` likeliest classes, and sometimes a less likely one in place of the last.

    Args:
        slowness: correlation of the logits of neighbouring frames.
    """
    log_posterior_TV = random_log_posterior(rng, num_frames, num_classes, scale, slowness)
    ranked_TV = ranking(log_posterior_TV)
    kept_TV = np.zeros(log_posterior_TV.shape, dtype=bool)
    for frame, count in enumerate(rng.integers(0, min(max_entries, num_classes), num_frames, endpoint=True)):
        ranks = np.arange(count)
        if count and rng.random() < 0.25:
            ranks[-1] = rng.integers(count - 1, num_classes)
        kept_TV[frame, ranked_TV[frame, ranks]] = True
    return targets_from_dense(log_posterior_TV, kept_TV, temperatures)


def assert_same_targets(found: SoftTargets, expected: SoftTargets) -> None:
    """Bit for bit."""
    assert (found.num_classes, found.temperatures) == (expected.num_classes, expected.temperatures)
    for name in ("offsets", "class_ids", "log_probs", "tail_mass"):
        found_array, expected_array = getattr(found, name), getattr(expected, name)
        assert found_array.dtype == expected_array.dtype, name
        np.testing.assert_array_equal(found_array, expected_array, err_msg=name, strict=True)


def assert_within_bound(codec: str, found: SoftTargets, expected: SoftTargets) -> None:
    """The error bounds that FORMAT.md states for the codecs."""
    if codec == "packed-f32":
        assert_same_targets(found, expected)
        return
    assert (found.num_classes, found.temperatures) == (expected.num_classes, expected.temperatures)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_array_equal(found.class_ids, expected.class_ids)
    exact_E, found_E = expected.log_probs.astype(np.float64), found.log_probs.astype(np.float64)
    exact_TK, found_TK = expected.tail_mass.astype(np.float64), found.tail_mass.astype(np.float64)
    if codec == "packed-u8":
        assert (np.abs(found_E - exact_E)[exact_E >= -15.9375] <= 1 / 32).all()
        assert (found_E[exact_E < -15.9375] == -15.9375).all()
        bound_TK = np.where(exact_TK > 0.99996, 1 / 65_535, 1 / 131_070)
        # 1e-7: the decoded tail is rounded to float32.
        assert (np.abs(np.sqrt(found_TK) - np.sqrt(exact_TK)) <= bound_TK + 1e-7).all()
        return
    assert codec == "mtf-sqrt"
    assert (np.abs(np.exp(found_E / 2) - np.exp(exact_E / 2)) <= 1 / 384 + 1e-7).all()
    bound_TK = np.where(exact_TK > 0.9999, np.pi / 510, np.pi / 1020)
    # Near 1 the angle of a float32 is no more exact than that.
    assert (np.abs(np.arcsin(np.sqrt(found_TK)) - np.arcsin(np.sqrt(exact_TK))) <= bound_TK + 4e-4).all()
