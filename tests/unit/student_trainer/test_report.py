"""``student-trainer compare``: numbers against hand-computed ones, refusals, and the page, also in a real browser."""

from __future__ import annotations

import html.parser
import http.server
import json
import re
import subprocess
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from softlabel_schemas.errors import InputError
from student_trainer.cli import main
from student_trainer.compare import Comparison, compare, results, text, warnings
from student_trainer.report import render
from student_trainer.run_folder import RunFolder, build_model
from tests.support.datasets import INVENTORY, Written, random_rows, write_dataset
from tests.support.runs import ENSEMBLE, HARD, SOFT, evaluation, write_run

CHROMIUM = Path("/usr/bin/chromium")
# What the browser asks its maker by itself (the time, accounts, updates), whatever page it shows.
OF_CHROMIUM = re.compile(r"^\w+ (http://)?(?!fonts)[\w.-]+\.(google|gvt1|googleapis)\.com[:/]")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_dataset(str(tmp_path_factory.mktemp("report") / "labels"), shard_format="parquet")


@pytest.fixture
def runs(tmp_path: Path, labels: Written) -> list[str]:
    """Two arms of three seeds."""
    digest = labels.manifest.content_digest
    hard = [write_run(tmp_path / f"hard-{seed}", "hard", errors, seed=seed) for seed, errors in enumerate(HARD)]
    return hard + [
        write_run(tmp_path / f"soft-{seed}", "soft", errors, seed=seed, dataset=digest)
        for seed, errors in enumerate(SOFT)
    ]


@pytest.fixture
def ensemble(tmp_path: Path) -> str:
    found = evaluation("ensemble", ENSEMBLE, kind="ensemble", dataset="e" * 64, cross_entropy=None)
    RunFolder(tmp_path).write_json("ensemble-test.json", found)
    return str(tmp_path / "ensemble-test.json")


@pytest.fixture
def whole(runs: list[str], ensemble: str, labels: Written) -> Comparison:
    return compare(runs, [ensemble], [labels.url], ["test"])


def edit(path: Path, **changes: Any) -> None:
    RunFolder(path.parent).write_json(path.name, {**json.loads(path.read_text()), **changes})


def student_trainer(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_means_and_sample_deviations(whole: Comparison) -> None:
    arms = {arm["name"]: arm for arm in results(whole)["arms"]}
    assert list(arms) == ["hard", "soft", "ensemble"]
    assert arms["hard"]["seeds"] == [0, 1, 2]
    # 40, 42, 44: mean 42, sample variance (4 + 0 + 4) / 2.
    assert arms["hard"]["frame_error_rate"] == {"mean": 42.0, "std": 2.0, "values": [40.0, 42.0, 44.0]}
    assert arms["soft"]["frame_error_rate"] == {"mean": 31.0, "std": 1.0, "values": [30.0, 31.0, 32.0]}
    assert arms["soft"]["phone_error_rate"] == {"mean": 51.0, "std": 1.0, "values": [50.0, 51.0, 52.0]}
    assert arms["soft"]["cross_entropy"] == {"mean": 1.75, "std": 0.25, "values": [1.5, 1.75, 2.0]}
    assert arms["ensemble"]["frame_error_rate"] == {"mean": 25.0, "std": None, "values": [25.0]}
    assert arms["ensemble"]["cross_entropy"] is None
    assert (arms["ensemble"]["kind"], arms["ensemble"]["num_parameters"]) == ("ensemble", None)


def test_the_pair(whole: Comparison) -> None:
    (pair,) = whole.pairs
    assert (pair.soft.name, pair.hard.name, pair.unlike) == ("soft", "hard", ())
    # Mean errors 30, 65, 30, 30 and 50, 80, 40, 40: 55 fewer of 500 frames.
    (found,) = pair.differences
    assert (found.metric, found.points) == ("frame_error_rate", pytest.approx(-11.0))
    # Every utterance improves: by 20, 7.5, 10 and 10%, which bounds every resample.
    assert -20 < found.low < found.points < found.high < -7
    # Of four signs.
    assert found.p_value == 1 / 8


def test_the_text(runs: list[str], ensemble: str) -> None:
    lines = text(compare([runs[0], *runs[3:]], [ensemble], [], ["test"])).splitlines()
    columns = "arm  seeds  parameters  frame error %  phone error %  cross-entropy  calibration error %"
    assert [re.split(r"  +", line) for line in lines[:5]] == [
        re.split(r"  +", columns),
        ["-" * len(name) for name in ("ensemble *", "seeds", "parameters", "30.00 ± 1.000", *["-" * 13] * 2, "-" * 19)],
        ["hard", "1", "123,456", "40.00 ± –", "50.00 ± –", "1.500 ± –", "3.00 ± –"],
        ["soft", "3", "123,456", "31.00 ± 1.00", "51.00 ± 1.00", "1.750 ± 0.250", "3.00 ± 0.00"],
        ["ensemble *", "–", "–", "25.00", "50.00", "–", "3.00"],
    ]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5:7] == ["* teacher ensemble, from its stored soft labels", ""]
    assert re.fullmatch(
        r"soft: no clear difference from hard in frame errors \(−9\.00, 95% interval −\S+ to −\S+, p = 0\.125\)",
        lines[7],
    )
    assert lines[8:] == [
        "warning: soft and hard were not trained alike: seeds: [0, 1, 2] against [0]",
        "warning: intervals of so few utterances (4) are too narrow, and say little; evaluate on 20 or more",
    ]


def test_a_small_p(whole: Comparison) -> None:
    (pair,) = whole.pairs
    clear = replace(pair, differences=tuple(replace(found, p_value=2 / 10_001) for found in pair.differences))
    found = replace(whole, pairs=(clear,))
    assert re.search(r"soft: \d+\.\d+ points fewer frame errors than hard \(.*p < 0\.001\)", text(found))
    assert "<td>&lt;\u00a00.001</td>" in render(found)


@pytest.mark.parametrize(("num_utterances", "is_warned"), [(19, True), (20, False)])
def test_few_utterances_are_named(whole: Comparison, num_utterances: int, is_warned: bool) -> None:
    first = whole.arms[0].evaluations[0]
    many = first.model_copy(update={"utterances": first.utterances[:1] * num_utterances})
    found = replace(whole, arms=(replace(whole.arms[0], evaluations=(many,)),), pairs=())
    assert any("so few utterances (19)" in line for line in warnings(found)) is is_warned


def test_no_clear_difference_is_said(tmp_path: Path, runs: list[str], labels: Written) -> None:
    # 10 fewer, 10 more: intervals hold zero.
    mixed = write_run(tmp_path / "m", "mixed", (40, 80, 40, 40), dataset=labels.manifest.content_digest)
    assert "mixed: no clear difference from hard in frame errors (+0.00, 95% interval −" in text(
        compare([runs[0], mixed], [], [], ["test"])
    )


def test_only_the_same_model_makes_a_pair(tmp_path: Path, runs: list[str]) -> None:
    wider = {"architecture": "tdnn", "arguments": {"hidden": 128}}
    other = write_run(tmp_path / "other", "other", HARD[0], model=wider)
    found = compare([other, *runs[3:]], [], [], ["test"])
    assert found.pairs == ()
    assert "no arm with soft labels has a hard-only arm of the same model" in text(found)
    assert "There is no arm with soft labels" in render(found)


def test_unequal_budgets_are_named(tmp_path: Path, runs: list[str]) -> None:
    training = {"epochs": 4, "batch_seconds": 60.0}
    longer = write_run(tmp_path / "longer", "longer", HARD[0], training=training, num_epochs=4)
    found = compare([longer, runs[3]], [], [], ["test"])
    line = "soft and longer were not trained alike: training.epochs: 3 against 4; training.batch_seconds: 40.0 against 60.0"
    assert f"warning: {line}" in text(found)
    assert f"<strong>Warning:</strong> {line}</p>" in render(found)


def test_errors_on_training_speech_are_named(runs: list[str], ensemble: str) -> None:
    config = RunFolder(runs[0]).config()
    heard = config.model_copy(update={"corpus": config.corpus.model_copy(update={"train_splits": ("train", "test")})})
    edit(Path(runs[0]) / "run.json", config=heard.model_dump(mode="json"))
    found = compare([runs[0]], [ensemble], [], ["test"])
    assert found.pairs == ()
    lines = [line for line in text(found).splitlines() if "other speech" in line]
    assert len(lines) == 1
    named = "hard was trained on split test, on which it is evaluated here: "
    assert lines[0].startswith(f"warning: {named}")
    assert f"<strong>Warning:</strong> {named}" in render(found)


def test_many_unequal_budgets_are_one_line_for_each_setting(tmp_path: Path, runs: list[str]) -> None:
    hard = [
        write_run(tmp_path / f"{epochs}", f"hard-{epochs}", HARD[0], training={"epochs": epochs}, num_epochs=epochs)
        for epochs in range(4, 11)
    ]
    found = [
        line for line in text(compare([*hard, runs[0], runs[3]], [], [], ["test"])).splitlines() if "alike" in line
    ]
    assert found == ["warning: 7 of 8 pairs were not trained alike in training.epochs, as soft and hard-4: 3 against 4"]


def test_missing_files_say_which_command_makes_them(tmp_path: Path, runs: list[str]) -> None:
    with pytest.raises(InputError, match=r"nowhere/run\.json does not exist; .* student-trainer train TRAIN\.toml"):
        compare([str(tmp_path / "nowhere")], [], [], ["test"])
    with pytest.raises(InputError, match=r"nowhere\.json does not exist; .*student-trainer evaluate --dataset URL"):
        compare(runs, [str(tmp_path / "nowhere.json")], [], ["test"])
    command = f"student-trainer evaluate {runs[0]} --corpus corpus.parquet --split dev"
    with pytest.raises(InputError, match=re.escape(f"evaluation-dev.json does not exist; make it with: {command}")):
        compare(runs, [], [], ["dev"])
    with pytest.raises(InputError, match="nothing is not a published dataset"):
        compare(runs, [], [str(tmp_path / "nothing")], ["test"])


UTTERANCES = evaluation("", HARD[0])["utterances"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus_digest": "d" * 64}, r"hard-0 and .*soft-0 cannot be compared: corpora differ \(c{64} and d{64}\)"),
        ({"splits": ["dev"]}, r"cannot be compared: splits differ"),
        ({"inventory_digest": "b" * 64}, r"soft-0: trained and evaluated with different class inventories"),
        ({"utterances": UTTERANCES[:3]}, r"4 and 3 utterances, not the same ones .* \(utterance utt-3\)"),
        ({"utterances": UTTERANCES[::-1]}, r"4 and 4 utterances, .*not in the same order; evaluate both"),
        (
            {"utterances": [*UTTERANCES[:3], {**UTTERANCES[3], "frames": 99}]},
            r"not the same ones .*\(utterance utt-3\)",
        ),
        ({"utterances": []}, r"evaluation-test\.json is not valid:\n  utterances: "),
        ({"frame_error_rate": "low"}, r"evaluation-test\.json is not valid:\n  frame_error_rate: "),
    ],
)
def test_evaluations_of_other_data_are_refused(runs: list[str], changes: dict[str, Any], message: str) -> None:
    edit(Path(runs[3]) / "evaluation-test.json", **changes)
    with pytest.raises(InputError, match=message):
        compare(runs, [], [], ["test"])


def test_other_class_inventories_are_refused(tmp_path: Path, runs: list[str], labels: Written) -> None:
    other = write_run(tmp_path / "other", "other", SOFT[0], inventory_digest="b" * 64)
    edit(Path(other) / "evaluation-test.json", inventory_digest="b" * 64)
    with pytest.raises(InputError, match="class inventories differ"):
        compare([*runs, other], [], [], ["test"])
    with pytest.raises(InputError, match=f"not label the classes of the runs: .* digest {INVENTORY.digest()}"):
        compare([other], [], [labels.url], ["test"])


def test_a_wrong_split_in_the_file_is_refused(runs: list[str]) -> None:
    edit(Path(runs[0]) / "evaluation-test.json", splits=["dev"])
    with pytest.raises(InputError, match=r"hard-0 was evaluated on \['dev'\], --split says \['test'\]"):
        compare(runs[:1], [], [], ["test"])


def test_an_evaluation_from_before_training_went_on_is_refused(runs: list[str]) -> None:
    folder = RunFolder(runs[3])
    folder.write_model(build_model(folder.config(), INVENTORY))
    edit(folder.path / "evaluation-test.json", weights_digest=folder.weights_digest())
    assert compare(runs, [], [], ["test"]).arms
    edit(folder.path / "evaluation-test.json", weights_digest="0" * 64)
    command = f"student-trainer evaluate {runs[3]} --corpus corpus.parquet --split test"
    with pytest.raises(InputError, match=re.escape(f"{runs[3]}: its evaluation is of other weights")) as error:
        compare(runs, [], [], ["test"])
    assert str(error.value).endswith(f"run: {command}")


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "hard", HARD[0], num_epochs=2)
    with pytest.raises(InputError, match="has trained 2 of 3 epochs; finish it with 'student-trainer train'"):
        compare([run], [], [], ["test"])


def test_runs_of_one_name_must_be_seeds_of_one_arm(tmp_path: Path, runs: list[str]) -> None:
    copied = write_run(tmp_path / "copied", "hard", HARD[0], seed=2)
    with pytest.raises(InputError, match=r"hard-2 and .*copied are the same arm and seed \(2\)"):
        compare([*runs, copied], [], [], ["test"])
    other = write_run(tmp_path / "other", "hard", HARD[0], seed=3, training={"learning_rate": 0.5})
    message = r"both named 'hard' but are not seeds of one arm: training.learning_rate: 0.002 against 0.5; give"
    with pytest.raises(InputError, match=message):
        compare([*runs, other], [], [], ["test"])


def test_results_of_one_name_are_told_apart(tmp_path: Path, runs: list[str]) -> None:
    for folder in ("a", "b"):
        RunFolder(tmp_path / folder).write_json("narrow.json", evaluation("hard", ENSEMBLE, kind="ensemble"))
    files = [str(tmp_path / folder / "narrow.json") for folder in ("a", "b")]
    assert [arm.name for arm in compare(runs, files[:1], [], ["test"]).arms] == ["hard", "soft", "hard (narrow)"]
    with pytest.raises(InputError, match=r"there is a result named 'hard \(narrow\)' already"):
        compare(runs, files, [], ["test"])


@pytest.mark.parametrize("shard_format", ["parquet", "zarr"])
def test_a_dataset_is_read_whole(tmp_path: Path, runs: list[str], shard_format: str) -> None:
    written = write_dataset(str(tmp_path / "labels"), shard_format=shard_format, rows=random_rows(seed=3))
    (data,) = compare(runs, [], [written.url], ["test"]).datasets
    frames = [utterance.targets.num_frames for utterance in written.utterances]
    assert data.frames_N.tolist() == frames
    assert data.kept_mass_N.tolist() == [utterance.stats.kept_mass for utterance in written.utterances]
    assert data.entropy_N.tolist() == [utterance.stats.entropy for utterance in written.utterances]
    assert data.facts["bytes_per_frame"] == written.manifest.num_bytes / sum(frames)
    # The figures weight utterances by frames, as the manifest's sums do.
    mean = np.average(data.kept_mass_N.astype(float), weights=data.frames_N)
    assert data.facts["kept_mass"] == pytest.approx(mean)
    assert f"{written.url} {mean:.3f}" in render(compare(runs, [], [written.url], ["test"]))


class Page(html.parser.HTMLParser):
    """What the tests ask of a page: its cells, ids, tags, and every attribute that could load something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attributes:
            if name == "id":
                self.ids[value or ""] += 1
            elif name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action", "background"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


RESULT_ROWS = [
    ["hard", "3", "123,456", "42.00 ± 2.00", "51.00 ± 1.00", "1.750 ± 0.250", "3.00 ± 0.00"],
    ["soft", "3", "123,456", "31.00 ± 1.00", "51.00 ± 1.00", "1.750 ± 0.250", "3.00 ± 0.00"],
    ["ensemble (teachers)", "–", "–", "25.00", "50.00", "–", "3.00"],
]


def check_page(source: str) -> Page:
    page = Page(source)
    assert [row for row in RESULT_ROWS if row not in page.rows] == []
    assert [name for name, count in page.ids.items() if count > 1] == []
    # Only places within the page itself are referred to.
    assert [reference for reference in page.references if reference[:1] != "#" or reference[1:] not in page.ids] == []
    forbidden = {"script", "link", "img", "iframe", "object", "embed", "image", "foreignobject"}
    assert forbidden & set(page.tags) == set()
    assert "@import" not in source
    return page


def test_the_page(whole: Comparison, labels: Written) -> None:
    source = render(whole)
    page = check_page(source)
    assert page.tags["figure"] == 4
    assert page.tags["table"] == page.tags["caption"] == 4
    pair = page.rows[1 + len(RESULT_ROWS) + 1]
    assert [*pair[:4], pair[5]] == ["soft", "hard", "frames", "−11.00", "0.125"]
    assert re.fullmatch(r"−\S+ to\xa0−\S+", pair[4])
    setup = ["tdnn (hidden\xa064)", "0, 1, 2", "123,456", "3", "40", "0.002"]
    assert ["hard", *setup, "–", "–", "–"] in page.rows
    loss = "weight\xa00.8, temperature\xa01, tail\xa0ghost, heads\xa01"
    assert ["soft", *setup, loss, "as stored", labels.manifest.content_digest[:12]] in page.rows
    bytes_per_frame = labels.manifest.num_bytes / labels.manifest.num_frames
    assert f"soft 31.00 percent at {bytes_per_frame:.1f} bytes per frame" in source
    # Dev error is 60 - 5 epochs + seed: 56 to 46 in the mean over seeds.
    assert "hard 56.0 to 46.0; soft 56.0 to 46.0" in source
    assert "Not an equal comparison" not in source
    assert "<svg" in source
    assert source.count('role="img" aria-labelledby=') == 4


def test_the_page_is_the_same_each_time(whole: Comparison) -> None:
    assert render(whole) == render(whole)


def test_the_page_without_datasets_and_dev_splits(tmp_path: Path, labels: Written) -> None:
    run = write_run(tmp_path / "run", "soft", SOFT[0], dataset=labels.manifest.content_digest)
    history = json.loads((tmp_path / "run" / "run.json").read_text())["history"]
    edit(tmp_path / "run" / "run.json", history=[{"epoch": record["epoch"]} for record in history])
    source = render(compare([run], [], [], ["test"]))
    assert "No run was evaluated on dev splits" in source
    assert "Not shown, for want of their dataset (give it with --dataset): soft." in source
    assert source.count("No dataset was given (--dataset).") == 2
    assert 'role="img" aria' not in source


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    name = '<b id="x">$a_b$ & \\frac'
    run = write_run(tmp_path / "run", name, HARD[0])
    page = Page(render(compare([run], [], [], ["test"])))
    assert page.tags["b"] == 0
    assert page.rows[1][0] == name


def test_the_command(tmp_path: Path, runs: list[str], ensemble: str, labels: Written) -> None:
    report, numbers = tmp_path / "out" / "report.html", tmp_path / "out" / "results.json"
    options = ["--evaluation", ensemble, "--dataset", labels.url, "--split", "test"]
    result = student_trainer("compare", *runs, *options, "--report", str(report), "--json", str(numbers))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{text(compare(runs, [ensemble], [], ['test']))}\nreport: {report}\n"
    check_page(report.read_text(encoding="utf-8"))
    found = json.loads(numbers.read_text())
    assert found["num_frames"] == 500
    assert found["pairs"][0]["frame_error_rate"]["difference"] == pytest.approx(-11.0)
    assert found["datasets"][0]["content_digest"] == labels.manifest.content_digest


def test_the_command_refuses_in_one_message(tmp_path: Path) -> None:
    result = student_trainer("compare", str(tmp_path), "--split", "test", "--report", str(tmp_path / "report.html"))
    assert (result.exit_code, result.stdout) == (2, "")
    expected = f"error: {tmp_path}/run.json does not exist; make a run with: student-trainer train TRAIN.toml\n"
    assert result.stderr == expected
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")
def test_the_page_in_a_browser(tmp_path: Path, whole: Comparison) -> None:
    """Chromium's own view of the page has the cells, and it asks nobody for anything.

    Every request would go through the proxy below, which writes it down.
    """
    asked: list[str] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            asked.append(self.rfile.readline().decode(errors="replace"))
            self.close_connection = True

    page = tmp_path / "report.html"
    probe = tmp_path / "probe.html"
    page.write_text(render(whole), encoding="utf-8")
    probe.write_text('<img src="http://example.invalid/picture.png">')
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            dom = _dump_dom(page, tmp_path / "profile", server.server_port)
            requests = [line for line in asked if not OF_CHROMIUM.search(line)]
            _dump_dom(probe, tmp_path / "profile", server.server_port)
        finally:
            server.shutdown()
    check_page(dom)
    assert requests == []
    # The proxy does see a page's requests.
    assert any("example.invalid/picture.png" in line for line in asked)


def _dump_dom(page: Path, profile: Path, proxy_port: int) -> str:
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --dump-dom"
    )
    proxy = f"--proxy-server=http://127.0.0.1:{proxy_port}"
    command = [str(CHROMIUM), *flags.split(), proxy, f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
