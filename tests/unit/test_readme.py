"""Every Markdown page: its links lead somewhere, its command lines parse, its TOML loads, its Python runs.

What the README's five tasks do is shown by ``tests/e2e/test_readme_tasks.py``, which runs them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

from softlabel_schemas.bundle import BundleReader
from student_trainer.config import load_config
from student_trainer.sweep_config import load_sweep
from teacher_service.config import TeacherConfig, load_job
from teacher_service.teacher import load_teacher
from tests.support.command_lines import COMMANDS, ROOT, check_command_line
from tests.support.datasets import write_dataset
from tests.support.pages import PAGES, anchors, fenced, links

LINES = sorted(
    {
        line
        for page in PAGES
        # A name holds a "#" too.
        for line in (each.split(" #")[0].strip() for each in page.read_text(encoding="utf-8").splitlines())
        if line.split(" ")[0] in COMMANDS
    }
)


def test_the_pages_are_found() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "schemas/FORMAT.md", "teacher_service/README.md", "tests/README.md"} <= names


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert found.exists(), f"{target}: there is no {found}"
        if anchor:
            assert anchor in anchors(found), f"{target}: {found} has no such heading"


@pytest.mark.parametrize("line", LINES)
def test_command_lines_parse(line: str) -> None:
    check_command_line(line)


def test_there_are_command_lines_for_every_command() -> None:
    shown = {tuple(line.split(" ")[:2]) for line in LINES}
    assert {(name, command) for name, group in COMMANDS.items() for command in group.commands} <= shown


def test_toml_is_toml() -> None:
    for page in PAGES:
        for block in fenced(page, "toml"):
            tomllib.loads(block)


def test_job_training_and_sweep_files_load(tmp_path: Path) -> None:
    (job,) = fenced(ROOT / "teacher_service" / "README.md", "toml")
    training, sweep = fenced(ROOT / "student_trainer" / "README.md", "toml")
    for name, text in (("job", job), ("student", training), ("sweep", sweep)):
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    assert len(load_job(tmp_path / "job.toml").teachers) == 2
    assert load_config(tmp_path / "student.toml").soft_labels is not None
    assert len(load_sweep(tmp_path / "sweep.toml").runs) == 11


def test_the_optional_settings_of_the_training_file_load(tmp_path: Path) -> None:
    """Those in comments, less what excludes others: a second way to name datasets, and CTC."""
    training, _ = fenced(ROOT / "student_trainer" / "README.md", "toml")
    text = re.sub(r"(?m)^# (?!urls |\[ctc\]|units |blank )(?=\[|[a-z_0-9]+ = )", "", training)
    (tmp_path / "student.toml").write_text(text.replace("num_heads = 1", "num_heads = 2"), encoding="utf-8")
    config = load_config(tmp_path / "student.toml")
    assert config.soft_labels is not None
    assert config.soft_labels.frames is not None
    assert config.augmentation is not None
    assert "# time_masks" not in text


def test_the_python_example_of_a_teacher_gives_a_teacher_whose_padding_changes_nothing(tmp_path: Path) -> None:
    (example,) = fenced(ROOT / "teacher_service" / "README.md", "python")
    subprocess.run([sys.executable, "-W", "ignore", "-c", example], cwd=tmp_path, check=True)
    config = TeacherConfig(bundle=str(tmp_path / "bundles" / "mine"))
    teacher = load_teacher(config, BundleReader(config.bundle), weight=1.0, device="cpu", precision="float32")
    assert (teacher.inventory.num_classes, teacher.front_end.num_features) == (500, 80)
    features = [torch.randn(length, 80) for length in (70, 9)]
    batch_BTD = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    logits_BTV, lengths_B = teacher.logits(batch_BTD, torch.tensor([70, 9]))
    assert lengths_B.tolist() == [70, 9]
    alone_BTV, _ = teacher.logits(features[1][None], torch.tensor([9]))
    torch.testing.assert_close(logits_BTV[1:, :9], alone_BTV)


def test_the_python_example_of_datasets_runs(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "labels-train"), shard_format="parquet")
    (example,) = fenced(ROOT / "schemas" / "README.md", "python")
    finished = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "utt-" in finished.stdout


def test_pages_render_as_tables() -> None:
    """A row with a cell too many or too few is cut or filled in silence."""
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        for token in MarkdownIt("gfm-like", {"linkify": False}).parse("\n".join(lines)):
            if token.type == "table_open" and token.map is not None:
                rows = [re.sub(r"\\\|", "", line) for line in lines[slice(*token.map)]]
                assert len({row.count("|") for row in rows}) == 1, (
                    f"{page}: rows of the table in line {token.map[0] + 1}"
                )
