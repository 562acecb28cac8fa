"""The page of results: made from records alone, and again from what it leaves beside itself."""

from __future__ import annotations

import itertools
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import pytest
from click.testing import CliRunner, Result

from student_trainer.cli import main
from student_trainer.results_arms import arms_of, shares_of_gain
from student_trainer.results_figure import bytes_figure, error_figure
from student_trainer.sweep_records import GainRecord, SweepRecords, records_json
from tests.support.records import difference_record, make_records

COMMITTED = Path(__file__).parents[3] / "student_trainer" / "results"
INTRODUCTION = "\n## Answers\n\nYes: 8 bytes are enough – see below.\n\n\n"
SIZES = {"all": 500.0, "32-bytes": 31.5, "8-bytes": 7.9, "4-bytes": 4.1}
ERRORS = {
    "hard": (64.0, 66.0),
    "all": (61.0, 62.0),
    "32-bytes": (61.0, 62.5),
    "8-bytes": (62.0, 62.5),
    "4-bytes": (63.0, 64.0),
    "ensemble": (54.5,),
}


DIFFERENCES = (
    difference_record("8-bytes", "hard", -2.75),
    difference_record("8-bytes", "ensemble", 7.75),
    # Not every arm has words, so there are no records of them.
    difference_record("8-bytes", "hard", -2.0, metric="word_error_rate"),
)
GAINS = [
    GainRecord(arm="8-bytes", baseline="hard", reference="all", kept=78.57, low=-3.25, high=104.96),
    GainRecord(arm="4-bytes", baseline="hard", reference="all", kept=42.86, low=12.0, high=60.0),
]
RECORDS = make_records(ERRORS, SIZES, gains=GAINS).model_copy(update={"differences": DIFFERENCES})
# Of two arms: one figure, small.
SMALL = make_records({"hard": (64.0, 66.0), "essence": (61.0, 62.0)}, {"essence": 7.9}, title="Does it help?")


def results(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["results", *map(str, arguments)])


def write_page(folder: Path, *sweeps: SweepRecords, introduction: str | None = None) -> str:
    """``page/speech.md`` and what belongs to it; its text."""
    (folder / "sweep.json").write_text(records_json(sweeps), encoding="utf-8")
    options: list[str | Path] = []
    if introduction is not None:
        (folder / "answers.md").write_text(introduction, encoding="utf-8")
        options = ["--introduction", folder / "answers.md"]
    outcome = results(folder / "sweep.json", *options, "--output", folder / "page" / "speech.md")
    assert outcome.exit_code == 0, outcome.output
    written = [Path(line) for line in outcome.output.splitlines()]
    assert sorted(written) == sorted((folder / "page").iterdir())
    return (folder / "page" / "speech.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``speech.md`` in a folder of its own, of one sweep."""
    folder = tmp_path_factory.mktemp("results")
    write_page(folder, RECORDS)
    return folder / "page" / "speech.md"


def of_page(folder: Path, stem: str) -> dict[str, bytes]:
    """All files of a page, by name; not those of ``STEM-settings.md``."""
    return {path.name: path.read_bytes() for names in (".*", "-[0-9]*") for path in folder.glob(stem + names)}


def check_that_it_is_made_again(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command that it names, in ``folder``, from what is not named as made."""
    command = re.search(r"`student-trainer (results [^`]*)`", page.read_text(encoding="utf-8"))
    assert command is not None
    for source in (f"{page.stem}.json", f"{page.stem}.introduction.md"):
        if (page.parent / source).exists():
            shutil.copy(page.parent / source, folder)
    monkeypatch.chdir(folder)
    outcome = CliRunner().invoke(main, command[1].split())
    assert outcome.exit_code == 0, outcome.output
    assert of_page(folder, page.stem) == of_page(page.parent, page.stem)


def table_rows(page: str, heading: str) -> list[list[str]]:
    """Of the table whose header begins with ``heading``."""
    lines = page.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(heading))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [line.strip("| ").split(" | ") for line in table]


@pytest.mark.parametrize(
    "made", ["plain", "introduced", *sorted(COMMITTED.glob("*.json"))], ids=lambda made: Path(made).stem
)
def test_it_is_made_again_by_the_command_that_it_names(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str | Path
) -> None:
    """Byte for byte; so is each page of this repository."""
    if made == "introduced":
        write_page(tmp_path, SMALL, SMALL, introduction=INTRODUCTION)
        page = tmp_path / "page" / "speech.md"
    elif isinstance(made, Path):
        page = made.with_suffix(".md")
    (tmp_path / "again").mkdir()
    check_that_it_is_made_again(page, tmp_path / "again", monkeypatch)


def test_an_introduction_stands_between_title_and_sections(tmp_path: Path) -> None:
    lines = write_page(tmp_path, SMALL, introduction=INTRODUCTION).splitlines()
    headings = [line for line in lines if line.startswith("#")]
    assert headings == ["# speech", "## Answers", "## Does it help?"]
    assert lines.index("Yes: 8 bytes are enough – see below.") < lines.index("## Does it help?")
    assert (tmp_path / "page" / "speech.introduction.md").read_text(encoding="utf-8") == INTRODUCTION


def test_an_introduction_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(records_json([SMALL]), encoding="utf-8")
    (tmp_path / "latin.md").write_bytes("große".encode("latin-1"))
    for name, message in (("none.md", "--introduction takes a Markdown file"), ("latin.md", "is not UTF-8 text")):
        outcome = results(
            tmp_path / "sweep.json", "--introduction", tmp_path / name, "--output", tmp_path / "page" / "speech.md"
        )
        assert outcome.exit_code == 2
        assert message in outcome.output
    assert not (tmp_path / "page").exists()


def test_records_are_not_overwritten_by_others(tmp_path: Path) -> None:
    """Of one sweep of two, and of a page that is called as its records; the one that is the whole stays as it is."""
    texts = {name: records_json([sweep]) for name, sweep in (("a", RECORDS), ("b", SMALL))}
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    a, b, opening = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "opening.md"
    opening.write_text("# Theirs\n", encoding="utf-8")
    for files, output, message in (
        ([a, b], tmp_path / "a.md", f"{a} would be overwritten by the records of all 2 files"),
        ([b], b, f"{b} is to be a page of Markdown"),
        ([b, "--introduction", opening], opening, f"{opening} is the introduction"),
    ):
        outcome = results(*files, "--output", output)
        assert outcome.exit_code == 2
        assert message in outcome.output
    assert results(a, "--output", tmp_path / "a.md").exit_code == 0
    assert {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.json")} == texts
    assert opening.read_text(encoding="utf-8") == "# Theirs\n"


def test_differences_are_also_in_percent_of_the_other_arm(page: Path) -> None:
    rows = table_rows(page.read_text(encoding="utf-8"), "| arm | against | errors | difference | relative |")
    # Of a mean of 65 and of 54.5. Over seeds −2 and −3.5; +7.5 and +8; there are no records of words.
    assert [row[:5] for row in rows] == [
        ["8-bytes", "hard", "frame", "−2.75 ± 1.06", "−4.23%"],
        ["8-bytes", "ensemble", "frame", "+7.75 ± 0.35", "+14.22%"],
        ["8-bytes", "hard", "word", "−2.00", "–"],
    ]


def test_seeds_are_paired_by_their_number() -> None:
    """Not by their order: an arm may have others than the rest."""
    records = make_records({"a": (1.0, 2.0, 4.0), "b": (10.0, 20.0, 30.0), "c": (0.5, 1.0, 3.0)}, {})
    of_a = [record for record in records.records if record.arm == "a" and record.seed != 0]
    others = [record for record in records.records if record.arm != "a"]
    a, b, c = arms_of(records.model_copy(update={"records": (*of_a, *others[::-1])}))[:3]
    b, c = (b, c) if b.name == "b" else (c, b)
    assert sorted(a.seeds_with(b, "frame_error_rate")) == [(2.0, 20.0), (4.0, 30.0)]
    # Of b's gain of 18 and 26 over it.
    assert sorted(shares_of_gain(b, b, a, "frame_error_rate")) == [0.0, 0.0]
    assert sorted(shares_of_gain(c, b, a, "frame_error_rate")) == [
        pytest.approx(100 * 27 / 26),
        pytest.approx(100 * 19 / 18),
    ]
    assert shares_of_gain(c, a, b, "frame_error_rate") == []


def test_how_much_of_a_gain_is_kept(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "What is kept of the gain of all over hard in frame error, +3.50 points:" in text
    assert table_rows(text, "| arm | bytes/frame | gain kept % |") == [
        # 2 of 3 points in the one seed, 3.5 of 4 in the other; 1 of 3 and 2 of 4.
        ["8-bytes", "7.9", "78.6", "−3.2 to 105.0", "67 to 88"],
        ["4-bytes", "4.1", "42.9", "12.0 to 60.0", "33 to 50"],
    ]


def test_a_gain_that_may_be_none(tmp_path: Path) -> None:
    unknown = GainRecord(arm="essence", baseline="essence", reference="hard", kept=0.0, low=None, high=None)
    text = write_page(tmp_path, SMALL.model_copy(update={"gains": (unknown,)}))
    assert "−3.50 points (its interval holds zero or is below it: the shares have none, and mean little):" in text
    assert table_rows(text, "| arm | bytes/frame | gain kept % |") == [["essence", "7.9", "0.0", "–", "–"]]


def texts(svg: str) -> set[str]:
    return {
        "".join(each.itertext()).strip()
        for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    }


class TestFigures:
    def test_every_arm_is_named_in_both(self, page: Path) -> None:
        for name in ("speech-1.svg", "speech-1-bytes.svg"):
            assert f"]({name})" in page.read_text(encoding="utf-8")
            named = texts((page.parent / name).read_text(encoding="utf-8"))
            assert ERRORS.keys() - {"ensemble"} <= named
            assert ("ensemble" if name == "speech-1.svg" else "ensemble, out of sight: 54.50") in named

    def test_against_bytes_only_where_four_sizes_differ(self) -> None:
        figure = bytes_figure(make_records(ERRORS | {"ensemble": (58.5,)}, SIZES), salt="a")
        assert figure is not None
        assert "ensemble" in texts(figure)
        assert bytes_figure(make_records(ERRORS, SIZES | {"8-bytes": SIZES["4-bytes"]}), salt="a") is None

    def test_a_reader_s_settings_change_nothing(self) -> None:
        plain = error_figure(SMALL, salt="a")
        with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path"}):
            assert error_figure(SMALL, salt="a") == plain
