"""The paired bootstrap against resamples that can be counted by hand; frame, phone and word errors of two arms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabel_schemas.errors import InputError
from student_trainer.arms import load_arms
from student_trainer.compare import Comparison, compare, results, text
from student_trainer.report import render
from student_trainer.run_folder import RunFolder
from student_trainer.significance import GainKept, gain_kept, paired_bootstrap
from tests.support.runs import HARD, SOFT, evaluation, write_run

FRAMES_2 = np.array([100.0, 100.0])


@pytest.mark.parametrize(
    ("errors_a", "errors_b", "expected"),
    [
        # Equal everywhere: no resample differs.
        ((40, 10), (40, 10), (0.0, 0.0, 0.0, 1.0)),
        # The same share of the frames everywhere: every resample is the difference itself. By chance two signs often agree.
        ((20, 20), (30, 30), (-10.0, -10.0, -10.0, 0.5)),
        ((30, 30), (20, 20), (10.0, 10.0, 10.0, 0.5)),
    ],
)
def test_bootstrap_where_resamples_agree(
    errors_a: tuple[int, int], errors_b: tuple[int, int], expected: tuple[float, ...]
) -> None:
    found = paired_bootstrap(np.array(errors_a, float), np.array(errors_b, float), FRAMES_2)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_better", "num_alike", "expected"),
    [(1, 0, 1.0), (2, 0, 1 / 2), (5, 0, 1 / 16), (13, 0, 2**-12), (13, 300, 2**-12), (14, 0, 2 / 10_001)],
)
def test_p_is_no_less_than_signs_can_show(num_better: int, num_alike: int, expected: float) -> None:
    """Utterances that are alike have none. From 14 on it is as low as resamples can show."""
    b = np.full(num_better + num_alike, 41.0)
    a = b - np.repeat([1.0, 0.0], [num_better, num_alike])
    assert paired_bootstrap(a, b, np.full(len(b), 100.0))[3] == expected


def test_bootstrap_where_resamples_differ() -> None:
    """-30 and +10 points: resamples are -30 (1/4), -10 (1/2) and +10 (1/4), so p is 2 x 1/4."""
    a, b = np.array([20.0, 60.0]), np.array([50.0, 50.0])
    difference, low, high, p_value = paired_bootstrap(a, b, FRAMES_2)
    assert (difference, low, high) == pytest.approx((-10.0, -30.0, 10.0))
    assert p_value == pytest.approx(0.5, abs=0.03)
    swapped = paired_bootstrap(b, a, FRAMES_2)
    assert swapped[:3] == pytest.approx((10.0, -10.0, 30.0))
    assert swapped[3] == p_value


def test_bootstrap_weights_utterances_by_their_frames() -> None:
    """One long utterance of 300 frames and 3 more errors, one of 100 frames and none: 3 / 400."""
    difference, *_ = paired_bootstrap(np.array([13.0, 5.0]), np.array([10.0, 5.0]), np.array([300.0, 100.0]))
    assert difference == pytest.approx(0.75)


def test_bootstrap_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    frames_U = rng.integers(50, 150, 60).astype(float)
    a, b = rng.binomial(100, 0.30, 60).astype(float), rng.binomial(100, 0.33, 60).astype(float)
    whole = paired_bootstrap(a, b, frames_U)
    monkeypatch.setattr("student_trainer.significance._INDICES_AT_ONCE", 6_000)
    assert paired_bootstrap(a, b, frames_U) == pytest.approx(whole)


class TestGainKept:
    def kept(self, tmp_path: Path, *errors: tuple[int, int, int, int]) -> GainKept:
        """Of an arm, a baseline and a reference."""
        names = ("arm", "baseline", "reference")
        runs = [write_run(tmp_path / name, name, of_arm) for name, of_arm in zip(names, errors, strict=True)]
        return gain_kept(*load_arms(runs, [], ["test"]))

    def test_numerator_and_denominator_are_of_the_same_resamples(self, tmp_path: Path) -> None:
        """A gain of 10 in one utterance and of 0 in three, of 10 and 30, 20, 40: all shares are between none and all."""
        found = self.kept(tmp_path, (40, 80, 40, 40), (50, 80, 40, 40), (40, 50, 20, 0))
        assert found.kept == pytest.approx(10.0)
        assert found.interval is not None
        assert found.interval[0] == 0
        # 100% where all four resampled are the first (1 of 256), 60 where three are and the third (4), 50 with the second.
        assert found.interval[1] == pytest.approx(50.0)

    def test_the_same_share_everywhere(self, tmp_path: Path) -> None:
        found = self.kept(tmp_path, (48, 76, 38, 36), (50, 80, 40, 40), (40, 60, 30, 20))
        assert found.kept == pytest.approx(20.0)
        assert found.interval == pytest.approx((20.0, 20.0))

    def test_the_baseline_and_the_reference_themselves(self, tmp_path: Path) -> None:
        baseline, reference = (50, 80, 40, 40), (40, 50, 20, 0)
        for arm, expected in ((baseline, 0.0), (reference, 100.0)):
            found = self.kept(tmp_path / f"{expected}", arm, baseline, reference)
            assert found.kept == expected
            assert found.interval == pytest.approx((expected, expected))

    def test_of_no_gain(self, tmp_path: Path) -> None:
        found = self.kept(tmp_path, (40, 80, 40, 40), (50, 80, 40, 40), (60, 70, 40, 40))
        assert found == GainKept(kept=None, interval=None)

    @pytest.mark.parametrize("arm", [(60, 90, 50, 50), (40, 70, 30, 30), (50, 80, 40, 40)])
    def test_of_a_loss(self, tmp_path: Path, arm: tuple[int, int, int, int]) -> None:
        """Of a reference that is clearly worse: an arm that is better than both keeps no share below 0, none that is worse
        keeps one."""
        found = self.kept(tmp_path, arm, (50, 80, 40, 40), (55, 85, 45, 45))
        assert found == GainKept(kept=None, interval=None)


# Of the four utterances: words, and each arm's errors among them, for each of two seeds.
WORDS = (10, 20, 10, 10)
HARD_WORDS = ((5, 10, 5, 5), (5, 12, 5, 5))
SOFT_WORDS = ((4, 8, 4, 4), (3, 7, 4, 4))


def with_words(found: dict[str, Any], errors: Sequence[int], *, graph_digest: str = "a" * 64) -> dict[str, Any]:
    """An evaluation that decoded words; half as many phone errors as frames, and none of soft labels'."""
    records = [
        {**record, "phones": 50, "phone_errors": record["frame_errors"] // 2, "words": words, "word_errors": wrong}
        for record, words, wrong in zip(found["utterances"], WORDS, errors, strict=True)
    ]
    rate = 100 * sum(errors) / sum(WORDS)
    return {**found, "word_error_rate": rate, "graph_digest": graph_digest, "utterances": records}


def write_seeds(tmp_path: Path, name: str, frames: Any, words: Any, dataset: str | None = None) -> list[str]:
    runs = []
    for seed, (frame_errors, word_errors) in enumerate(zip(frames, words, strict=False)):
        run = write_run(tmp_path / f"{name}-{seed}", name, frame_errors, seed=seed, dataset=dataset)
        found = with_words(evaluation(name, frame_errors, seed=seed), word_errors)
        RunFolder(run).write_json("evaluation-test.json", found)
        runs.append(run)
    return runs


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [
        *write_seeds(tmp_path, "hard", HARD, HARD_WORDS),
        *write_seeds(tmp_path, "soft", SOFT, SOFT_WORDS, dataset="d" * 64),
    ]


@pytest.fixture
def comparison(runs: list[str]) -> Comparison:
    return compare(runs, [], [], ["test"])


def test_differences_of_frames_phones_and_words(comparison: Comparison) -> None:
    (pair,) = comparison.pairs
    found = {difference.metric: difference for difference in pair.differences}
    assert list(found) == ["frame_error_rate", "phone_error_rate", "word_error_rate"]
    # Hard: 25 and 27 of 50 words; soft: 20 and 18.
    assert found["word_error_rate"].points == pytest.approx(100 * (19 - 26) / 50)
    # Hard: 100 and 105 of 200 phones; soft: 75 and 77 (65 // 2 is 32).
    assert found["phone_error_rate"].points == pytest.approx(100 * (76 - 102.5) / 200)
    for difference in found.values():
        assert difference.low <= difference.points <= difference.high < 0


def test_words_in_the_results(comparison: Comparison) -> None:
    numbers = results(comparison)
    hard, soft = numbers["arms"]
    assert hard["word_error_rate"]["values"] == [50.0, 54.0]
    assert soft["word_error_rate"]["mean"] == pytest.approx(38.0)
    # Sample deviation of 40 and 36.
    assert soft["word_error_rate"]["std"] == pytest.approx(8**0.5)
    assert numbers["pairs"][0]["word_error_rate"]["difference"] == pytest.approx(-14.0)
    assert {"interval", "p_value"} < set(numbers["pairs"][0]["phone_error_rate"])


def test_words_in_the_text_and_on_the_page(comparison: Comparison) -> None:
    shown, page = text(comparison), render(comparison)
    assert "word error %" in shown.splitlines()[0]
    assert "52.00 ± 2.83" in shown
    assert "soft: no clear difference from hard in word errors (−14.00, 95% interval −" in shown
    assert '<th scope="col">word error %</th>' in page
    assert "<li>soft: no clear difference from hard in word errors</li>" in page
    assert "<em>Word error</em>" in page


def test_words_are_shown_only_where_every_arm_has_them(tmp_path: Path, runs: list[str]) -> None:
    RunFolder(tmp_path).write_json("ensemble.json", evaluation("ensemble", SOFT[0], kind="ensemble"))
    found = compare(runs, [str(tmp_path / "ensemble.json")], [], ["test"])
    assert "word error %" not in text(found)
    assert "warning: word error rates are not shown: ensemble evaluated without words (evaluate --graph)" in text(found)
    assert "word_error_rate" not in results(found)["arms"][0]
    # Both arms of the pair have them.
    assert "soft: no clear difference from hard in word errors" in text(found)


def test_words_of_different_graphs_are_refused(runs: list[str]) -> None:
    other = with_words(evaluation("soft", SOFT[0]), SOFT_WORDS[0], graph_digest="b" * 64)
    RunFolder(runs[2]).write_json("evaluation-test.json", other)
    with pytest.raises(InputError, match=r"decoded with different graphs \(a{64} and b{64}\)"):
        compare(runs, [], [], ["test"])


def test_words_of_other_texts_are_refused(runs: list[str]) -> None:
    """With as many words in each utterance; evaluations without words have none."""
    for run, digest in zip(runs, (None, "a" * 64, None, "b" * 64), strict=True):
        found = RunFolder(run).read_json("evaluation-test.json")
        RunFolder(run).write_json("evaluation-test.json", found | {"transcripts_digest": digest})
    message = r"hard-1 and .*soft-1 cannot be compared: transcripts differ \(a{64} and b{64}\); evaluate both"
    with pytest.raises(InputError, match=message):
        compare(runs, [], [], ["test"])
    RunFolder(runs[3]).write_json("evaluation-test.json", found | {"transcripts_digest": "a" * 64})
    assert len(compare(runs, [], [], ["test"]).pairs) == 1


def test_one_seed_without_words_leaves_the_arm_without(runs: list[str]) -> None:
    RunFolder(runs[3]).write_json("evaluation-test.json", evaluation("soft", SOFT[1], seed=1))
    found = compare(runs, [], [], ["test"])
    assert [difference.metric for difference in found.pairs[0].differences] == ["frame_error_rate"]


def test_words_of_other_transcripts_are_refused(runs: list[str]) -> None:
    for run in runs[2:]:
        found = with_words(evaluation("soft", SOFT[0]), SOFT_WORDS[0])
        found["utterances"][1]["words"] += 1
        RunFolder(run).write_json("evaluation-test.json", found)
    with pytest.raises(InputError, match=r"soft and hard cannot be compared: .* different numbers of words"):
        compare(runs, [], [], ["test"])
