"""The README's five tasks, run word for word and in order, in a folder with a newcomer's corpus and teacher."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="no Hugging Face: pip install '.[hf]'")
pytest.importorskip("lhotse", reason="pip install lhotse")

import polars

from softlabel_schemas import load_corpus, open_dataset
from student_trainer.run_folder import RunFolder
from tests.support.command_lines import ROOT
from tests.support.newcomer import write_corpus_and_model
from tests.support.pages import blocks

pytestmark = pytest.mark.ray

README = ROOT / "README.md"
# The one thing that is not as it stands there: a student of noise learns nothing from its other 28 epochs.
EPOCHS = ("epochs = 30", "epochs = 2")


def task_blocks() -> list[tuple[str, str]]:
    """Language and text of the code blocks under "The five tasks", in order."""
    text = README.read_text(encoding="utf-8")
    (section,) = re.findall(r"(?ms)^## The five tasks$.*?(?=^## )", text)
    found = [block for block in blocks(README) if block[1] in section]
    assert {language for language, _ in found} == {"sh", "toml"}
    return found


def columns_shown() -> list[str]:
    """Of the table that the README asks for."""
    (header,) = re.findall(r"(?m)^ +(utterance_id .*)$", README.read_text(encoding="utf-8"))
    return str(header).split()


def run_block(commands: str, folder: Path) -> str:
    """What the commands print, each shown before it runs; ends at the first that fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    finished = subprocess.run(
        ["bash", "-e", "-x", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def test_the_tasks_in_order(tmp_path: Path) -> None:
    write_corpus_and_model(tmp_path, columns_shown())
    printed = []
    for language, text in task_blocks():
        if language == "toml":
            (name,) = re.findall(r"\A# (\w+\.toml)$", text, flags=re.MULTILINE)
            (tmp_path / name).write_text(text.replace(*EPOCHS), encoding="utf-8")
        else:
            printed.append(run_block(text, tmp_path))
    table, others, label, resume, share, train, compare = printed

    # Every form of the corpus gives the same utterances.
    summary = "corpus.parquet: 14 utterances, 0.00 h; train 8, dev 2, test 4"
    assert table.count(summary) == 1
    assert others.count(summary) == 2
    assert {row.text for row in load_corpus(tmp_path / "corpus.parquet")} == {"AB C", "B", "C AC", "BA"}

    assert "team/labels: made 1 of 1 shards" in label
    assert "already complete" in resume
    dataset = open_dataset(tmp_path / "team" / "labels")
    assert {utterance.utterance_id for utterance in dataset} == {f"train-{index}" for index in range(8)}

    assert "team#english:1 is team/labels" in share
    assert (tmp_path / "catalogue" / "index.html").exists()
    assert (tmp_path / "card.md").read_text(encoding="utf-8").startswith("---\n")
    assert len(open_dataset(tmp_path / "part")) == 8
    assert polars.read_parquet(tmp_path / "plain" / "*.parquet")["utterance_id"].n_unique() == 8

    assert "trained 2 epochs" in train
    soft, hard = (RunFolder(tmp_path / "runs" / name).config() for name in ("student", "hard"))
    assert soft.soft_labels is not None
    alone = {"name": "hard", "output": str(tmp_path / "runs" / "hard"), "soft_labels": None}
    assert hard == soft.model_copy(update=alone)

    # A table of both, and a verdict either way.
    assert re.search(r"(?m)^student +1 +[\d,]+ ", compare)
    assert re.search(r"(?m)^hard +1 +[\d,]+ ", compare)
    assert re.search(r"(?m)^student: .*token errors", compare)
    assert (tmp_path / "report.html").exists()
    evaluation = json.loads((tmp_path / "runs" / "hard" / "evaluation-test.json").read_text())
    assert evaluation["num_utterances"] == 4
