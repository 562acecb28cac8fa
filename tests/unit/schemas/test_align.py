"""``softlabels align``: real speech and the real aligner."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from click.testing import CliRunner, Result

from softlabel_schemas import ClassInventory, load_corpus
from softlabel_schemas.alignment import Aligner, AlignmentError
from softlabel_schemas.cli import main
from softlabel_schemas.corpus import check_hard_labels
from softlabel_schemas.frame_labels import nearest_frames
from softlabel_schemas.front_end import Fbank

pytest.importorskip("pocketsphinx", reason="pip install '.[align]'")

SOURCE = Path(__file__).parents[4] / "shared/data/speechocean762"
pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason=f"no speech: {SOURCE} does not exist")
# Of three speakers, one of them a child; all words are in the model's dictionary.
UTTERANCES = ("000010011", "021290121", "030210045", "012600177")


def samples_of(utterance_id: str) -> np.ndarray:
    return soundfile.read(SOURCE / "flac" / f"{utterance_id}.flac", dtype="int16")[0]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    with (SOURCE / "utterances.tsv").open() as file:
        return {row["utt"]: row["text"] for row in csv.DictReader(file, delimiter="\t")}


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner({"ELEPHANTZ": (("EH", "L"), ("EH", "L", "AH", "F", "AH", "N", "T", "S")), "WE": (("Z", "Z"),)})


def test_it_agrees_with_alignments_by_the_same_model(aligner: Aligner, texts: dict[str, str]) -> None:
    """Those of speechocean762 were made with a dictionary and settings of their own."""
    table = pq.read_table(SOURCE / "alignments.parquet", filters=[("utterance_id", "in", UTTERANCES)])
    shares = []
    for row in table.to_pylist():
        samples = samples_of(row["utterance_id"])
        num_frames = Fbank().num_frames(len(samples))
        found = aligner.align(texts[row["utterance_id"]], samples, num_frames)
        assert len(found.senones) == len(found.phones) == num_frames
        nearest_T = nearest_frames(len(row["senone"]), num_frames, 2.56)
        shares += [
            np.mean(found.senones == np.array(row["senone"])[nearest_T]),
            np.mean(found.phones == np.array(row["phone"])[nearest_T]),
        ]
    # 0.978 of the senones and 0.987 of the phones of 20 utterances.
    assert len(shares) == 2 * len(UTTERANCES)
    assert np.mean(shares) > 0.97


def test_an_alignment_depends_on_its_utterance_alone(aligner: Aligner) -> None:
    """Words are found in any case and with punctuation; what was aligned before is forgotten."""
    samples = samples_of("000010011")
    plain = aligner.align("WE CALL IT BEAR", samples, 258)
    aligner.align("call", np.random.default_rng(0).integers(-9_000, 9_000, 32_000, dtype=np.int16), 200)
    marked = aligner.align('"We call it: bear!"', samples, 258)
    np.testing.assert_array_equal(plain.senones, marked.senones)
    # The dictionary's own words stay as they are.
    assert "Z" not in plain.phones


def test_a_lexicon_adds_words(aligner: Aligner) -> None:
    found = aligner.align("elephantz", samples_of("000010011"), 258)
    assert {"EH", "L"} <= set(found.phones.tolist())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("we calll it bear", "no pronunciation of 'calll'"),
        ("... ,", r"no pronunciation of '\.\.\.'"),
        (" ", "no words"),
        ("we call it bear " * 20, "no path through the words fits the audio"),
    ],
)
def test_what_cannot_be_aligned(aligner: Aligner, text: str, message: str) -> None:
    with pytest.raises(AlignmentError, match=message):
        aligner.align(text, samples_of("000010011"), 258)


def softlabels(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]) -> Path:
    """A corpus of four utterances and four that cannot be aligned."""
    monkeypatch.chdir(tmp_path)
    Path("audio").mkdir()
    soundfile.write("audio/slow.flac", np.zeros(8_000), 8_000)
    for each in UTTERANCES:
        Path(f"audio/{each}.flac").symlink_to(SOURCE / "flac" / f"{each}.flac")
    rows = [
        (each, f"audio/{each}.flac", texts[each], "train" if each != UTTERANCES[-1] else "dev") for each in UTTERANCES
    ]
    rows += [
        ("mute", rows[0][1], "", "train"),
        ("strange", rows[0][1], "WE QWRTZ", "train"),
        ("strange-2", rows[0][1], "QWRTZ", "dev"),
        ("slow", "audio/slow.flac", "we", "train"),
    ]
    with Path("rows.tsv").open("w") as file:
        csv.writer(file, delimiter="\t").writerows([("utterance_id", "audio", "text", "split"), *rows])
    assert softlabels("import", "table", "rows.tsv", "--output", "corpus.parquet").exit_code == 0
    return tmp_path


def test_a_corpus(folder: Path) -> None:
    result = softlabels("align", "corpus.parquet", "--output", "made/aligned.parquet", "--processes", "1")
    assert result.exit_code == 0, result.output
    corpus, inventory = load_corpus("made/aligned.parquet"), ClassInventory.load("made/inventory.json")
    assert [each.utterance_id for each in corpus] == list(UTTERANCES)
    check_hard_labels(corpus, inventory, where="corpus")
    assert corpus.hard_label_frame_shift_ms == 30.0
    assert {"SIL"} <= set(inventory.silence_phones) <= {"SIL", "+NSN+", "+SPN+"}
    for utterance in corpus:
        assert utterance.hard_labels is not None
        assert len(utterance.hard_labels) == Fbank(stack=3).num_frames(utterance.num_samples)
        assert Path(*corpus.resolve(str(utterance.audio))).exists()
    assert result.stdout.splitlines() == [
        f"made/inventory.json: {inventory.num_classes} classes, those that occur",
        "made/aligned.parquet: 4 utterances, 0.00 h; train 3, dev 1",
        f"4 of them have hard labels, of {inventory.num_classes} classes, every 30 ms",
        "4 could not be aligned and are left out (see made/aligned.parquet.failed.tsv)",
        "  no text: 1 (mute)",
        "  no pronunciation of 'qwrtz': 2 (strange, strange-2)",
        "  sample rate is 8000 Hz, the front end expects 16000 Hz: 1 (slow)",
    ]
    failed = Path("made/aligned.parquet.failed.tsv").read_text().splitlines()
    assert failed[:2] == ["utterance_id\treason", "mute\tno text"]
    assert len(failed) == 5

    # However many processes there are.
    result = softlabels("align", "corpus.parquet", "--output", "again/aligned.parquet", "--processes", "2")
    assert result.exit_code == 0, result.output
    assert load_corpus("again/aligned.parquet").digest == corpus.digest


def test_a_bad_lexicon_and_a_missing_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("lexicon.txt").write_text("WORD QQ\n")
    result = softlabels("align", "corpus.parquet", "--output", "a.parquet", "--lexicon", "lexicon.txt")
    assert (result.exit_code, "the class inventory has no phone 'QQ'" in result.stderr) == (2, True)
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    result = softlabels("align", "corpus.parquet", "--output", "a.parquet")
    assert (result.exit_code, "pip install 'essence-distill[align]'" in result.stderr) == (2, True)


def test_nothing_to_train_on(folder: Path) -> None:
    result = softlabels("align", "corpus.parquet", "--output", "a.parquet", "--train-split", "eval")
    assert (result.exit_code, result.stderr) == (2, "error: the corpus has no split eval; it has dev, train\n")
    Path("rows.tsv").write_text("utterance_id\taudio\ttext\tsplit\nslow\taudio/slow.flac\twe\ttrain\n")
    assert softlabels("import", "table", "rows.tsv", "--output", "corpus.parquet").exit_code == 0
    result = softlabels("align", "corpus.parquet", "--output", "a.parquet", "--processes", "1")
    assert result.exit_code == 1
    assert "corpus.parquet: no utterance of train could be aligned\n  sample rate is 8000 Hz" in result.stderr
    assert not Path("a.parquet").exists()
