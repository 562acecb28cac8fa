"""CTC students compared: the same table, tests, records and pages as of labels of frames, of the metrics that they have."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from softlabel_schemas.errors import InputError
from student_trainer.cli import main
from student_trainer.compare import Comparison, compare, results, text
from student_trainer.report import render
from student_trainer.run_folder import RunFolder
from student_trainer.sweep_config import load_sweep
from student_trainer.sweep_records import SweepRecords, load_records, records_json, sweep_records
from tests.support.datasets import Written, write_dataset
from tests.support.records import make_records
from tests.support.runs import (
    ENSEMBLE,
    ENSEMBLE_TOKENS,
    HARD,
    HARD_TOKENS,
    SOFT_TOKENS,
    ctc_evaluation,
    evaluation,
    write_ctc_run,
    write_run,
)
from tests.support.sweeps import write_sweep

# Half way between HARD_TOKENS and SOFT_TOKENS in every utterance, in the mean over seeds.
HALF_TOKENS = ((8, 13, 7, 7), (8, 13, 7, 7))


def write_arm(folder: Path, name: str, errors: Any, dataset: str | None = None, units: str = "characters") -> list[str]:
    return [
        write_ctc_run(folder / f"{name}-{seed}", name, of_seed, seed=seed, dataset=dataset, units=units)
        for seed, of_seed in enumerate(errors)
    ]


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_dataset(str(tmp_path_factory.mktemp("ctc") / "labels"), shard_format="parquet")


@pytest.fixture
def runs(tmp_path: Path, labels: Written) -> list[str]:
    soft = write_arm(tmp_path, "soft", SOFT_TOKENS, labels.manifest.content_digest)
    return [*write_arm(tmp_path, "hard", HARD_TOKENS), *soft]


@pytest.fixture
def ensemble(tmp_path: Path) -> str:
    found = ctc_evaluation("ensemble", ENSEMBLE_TOKENS, kind="ensemble")
    # Frames of another length than the students': tokens are what is counted.
    for record in found["utterances"]:
        record["frames"] *= 2
    RunFolder(tmp_path).write_json("ensemble.json", found)
    return str(tmp_path / "ensemble.json")


@pytest.fixture
def whole(runs: list[str], ensemble: str, labels: Written) -> Comparison:
    return compare(runs, [ensemble], [labels.url], ["test"])


def edit(path: Path, **changes: Any) -> None:
    RunFolder(path.parent).write_json(path.name, {**json.loads(path.read_text()), **changes})


def test_token_and_word_errors_are_tested(whole: Comparison) -> None:
    (pair,) = whole.pairs
    found = {difference.metric: difference for difference in pair.differences}
    assert list(found) == ["token_error_rate", "word_error_rate"]
    # 41 and 29 of 100 tokens; 20.5 and 14.5 of 50 words.
    assert found["token_error_rate"].points == pytest.approx(-12.0)
    assert found["word_error_rate"].points == pytest.approx(-12.0)
    for difference in found.values():
        assert difference.low < difference.points < difference.high < 0


def test_the_table_and_the_numbers(whole: Comparison) -> None:
    lines = [re.split(r"  +", line) for line in text(whole).splitlines()]
    assert lines[0] == ["arm", "seeds", "parameters", "token error %", "word error %"]
    assert lines[2] == ["hard", "2", "123,456", "41.00 ± 1.41", "41.00 ± 1.41"]
    assert lines[4] == ["ensemble *", "–", "–", "20.00", "20.00"]
    assert "soft: no clear difference from hard in token errors (−12.00, 95% interval −" in text(whole)
    numbers = results(whole)
    assert numbers["num_tokens"] == 100
    assert "num_frames" not in numbers
    hard = numbers["arms"][0]
    assert hard["token_error_rate"]["values"] == [40.0, 42.0]
    assert {name for name in hard if name.endswith(("_rate", "_error", "entropy"))} == {
        "token_error_rate",
        "word_error_rate",
    }
    assert {"token_error_rate", "word_error_rate"} < numbers["pairs"][0].keys()


def test_the_page_says_nothing_of_errors_of_frames(whole: Comparison) -> None:
    page = render(whole)
    assert "4 utterances, 100 tokens;" in page
    for said in (
        "<em>Token error</em>",
        "<em>Word error</em>: the same of the words that the tokens spell.",
        "tokens</td>",
    ):
        assert said in page
    assert "Dev token error in percent, first to last epoch: hard 40.0 to 20.0; soft 40.0 to 20.0." in page
    assert "Token error: soft 29.00 percent at " in page
    assert "dev token error, %" in page
    for unsaid in ("rame error", "Phone error", "Calibration", "frames with hard labels"):
        assert unsaid not in page


def test_words_are_of_characters_alone(tmp_path: Path) -> None:
    found = compare(write_arm(tmp_path, "hard", HARD_TOKENS, units="words"), [], [], ["test"])
    assert found.metrics == ("token_error_rate",)
    assert "not shown" not in text(found)
    assert "Word error" not in render(found)


class TestRecords:
    @pytest.fixture
    def records(self, tmp_path: Path, runs: list[str], ensemble: str) -> SweepRecords:
        """Beside hard and soft an arm half way between them, and their ensemble."""
        half = write_arm(tmp_path, "half", HALF_TOKENS, "d" * 64)
        sweep = load_sweep(write_sweep(tmp_path, "sweep", ctc=True))
        asked = replace(sweep, pairs=(("half", "ensemble"),), gain=("hard", "soft"))
        return sweep_records(compare([*runs, *half], [ensemble], [], ["test"]), asked)

    def test_they_are_of_the_metrics_that_there_are(self, tmp_path: Path, records: SweepRecords) -> None:
        assert (records.num_tokens, records.num_frames) == (100, None)
        values = {(each.arm, each.seed): each.value for each in records.records if each.metric == "token_error_rate"}
        assert [values["half", 0], values["half", 1], values["ensemble", None]] == [35.0, 35.0, 20.0]
        assert {each.metric for each in records.records} == {"token_error_rate", "word_error_rate"}
        tested = {(each.arm, each.against, each.metric): each for each in records.differences}
        assert tested["half", "ensemble", "token_error_rate"].difference == pytest.approx(15.0)
        assert tested["soft", "hard", "word_error_rate"].better_seeds == 2
        (gain,) = records.gains
        assert (gain.arm, gain.kept, gain.low, gain.high) == ("half", *[pytest.approx(50.0)] * 3)
        (tmp_path / "sweep.json").write_text(records_json([records]), encoding="utf-8")
        assert load_records(tmp_path / "sweep.json") == (records,)
        assert "num_frames" not in (tmp_path / "sweep.json").read_text(encoding="utf-8")

    def test_the_page_of_results(self, tmp_path: Path, records: SweepRecords) -> None:
        (tmp_path / "sweep.json").write_text(records_json([records]), encoding="utf-8")
        arguments = ["results", str(tmp_path / "sweep.json"), "--output", str(tmp_path / "page.md")]
        outcome = CliRunner().invoke(main, arguments)
        assert outcome.exit_code == 0, outcome.output
        page = (tmp_path / "page.md").read_text(encoding="utf-8")
        assert "4 utterances of test, 100 tokens; corpus" in page
        assert "| bytes/frame | token error % | word error % |" in page
        assert "What is kept of the gain of soft over hard in token error, +12.00 points:" in page
        assert "![Token error of each arm](page-1.svg)" in page
        assert "| half | ensemble | token | +15.00 ± 0.00 | +75.00% |" in page
        assert ">token error, percent (mean" in (tmp_path / "page-1.svg").read_text(encoding="utf-8")

    def test_files_that_are_refused(self, records: SweepRecords) -> None:
        with pytest.raises(ValueError, match="num_tokens is missing; the token_error_rate is of as many"):
            SweepRecords.model_validate(records.model_dump() | {"num_tokens": None})
        of_frames = make_records({"other": (50.0,)}, {}).records
        with pytest.raises(ValueError, match="there is no token_error_rate of other; expected one of every arm"):
            SweepRecords.model_validate(records.model_dump() | {"records": (*records.records, *of_frames)})


class TestRefused:
    def test_hard_labels_of_frames_beside_ctc(self, tmp_path: Path, runs: list[str]) -> None:
        framewise = write_run(tmp_path / "frames", "frames", HARD[0])
        both = "one counts errors of tokens, the other of frames; compare students of CTC and of hard labels of frames apart"
        with pytest.raises(InputError, match=f"hard-0 and .*frames cannot be compared: the {both}"):
            compare([*runs, framewise], [], [], ["test"])
        with pytest.raises(InputError, match="of frames, the other of tokens"):
            compare([framewise, *runs], [], [], ["test"])

    def test_an_ensemble_evaluated_frame_by_frame(self, tmp_path: Path, runs: list[str]) -> None:
        RunFolder(tmp_path).write_json("frames.json", evaluation("ensemble", ENSEMBLE, kind="ensemble"))
        with pytest.raises(InputError, match="evaluate CTC teachers with --ctc"):
            compare(runs, [str(tmp_path / "frames.json")], [], ["test"])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"units": "words"}, r"units of the transcripts differ \(characters and words\)"),
            ({"transcripts_digest": "e" * 64}, r"transcripts differ \(d{64} and e{64}\)"),
            ({"tokens": 19}, r"\(or not of as many tokens\) or not in the same order \(utterance utt-0\)"),
            ({"tokens": None}, r"utterance utt-0 has no 'tokens', of which the token_error_rate is made"),
            ({"token_error_rate": None}, r"there is no frame_error_rate and, of CTC, no token_error_rate"),
        ],
    )
    def test_evaluations_of_other_transcripts(self, runs: list[str], changes: dict[str, Any], message: str) -> None:
        found = ctc_evaluation("soft", SOFT_TOKENS[0])
        if "tokens" in changes:
            found["utterances"][0] |= changes
            changes = {}
        edit(Path(runs[2]) / "evaluation-test.json", **found | changes)
        with pytest.raises(InputError, match=message):
            compare(runs, [], [], ["test"])

    def test_seeds_trained_on_other_transcripts(self, tmp_path: Path, runs: list[str]) -> None:
        other = write_ctc_run(tmp_path / "o", "hard", HARD_TOKENS[0], seed=2, transcripts_digest="e" * 64)
        with pytest.raises(InputError, match="are not seeds of one arm: transcripts_digest"):
            compare([*runs, other], [], [], ["test"])
