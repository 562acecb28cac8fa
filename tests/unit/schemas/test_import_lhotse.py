"""``softlabels import lhotse``: cut manifests that lhotse writes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from softlabel_schemas import ClassInventory, load_corpus
from softlabel_schemas.cli import main
from tests.support.foreign_corpora import RATE, TEXTS, Recordings, make_recordings, rows_of

lhotse = pytest.importorskip("lhotse", reason="pip install lhotse")


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recordings:
    monkeypatch.chdir(tmp_path)
    return make_recordings(tmp_path)


def cut_of(recordings: Recordings, utterance_id: str, **supervision: Any) -> Any:
    recording = lhotse.Recording.from_file(recordings.audio(utterance_id), recording_id=utterance_id)
    cut = recording.to_cut()
    cut.id = utterance_id
    cut.supervisions = [
        lhotse.SupervisionSegment(
            id=utterance_id,
            recording_id=utterance_id,
            start=0.0,
            duration=recording.duration,
            text=TEXTS[utterance_id],
            speaker=utterance_id[:4],
            **supervision,
        )
    ]
    return cut


def write_cuts(*cuts: Any, name: str = "cuts.jsonl.gz") -> None:
    lhotse.CutSet.from_cuts(cuts).to_file(name)


def import_lhotse(*args: str) -> Result:
    return CliRunner().invoke(main, ["import", "lhotse", *args, "--output", "corpus.parquet"])


def imported(*args: str) -> str:
    result = import_lhotse(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: str) -> str:
    result = import_lhotse(*args)
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.mark.parametrize("name", ["cuts.jsonl.gz", "cuts.jsonl"])
def test_cuts(recordings: Recordings, name: str) -> None:
    write_cuts(*(cut_of(recordings, each) for each in TEXTS), name=name)
    assert imported(f"train={name}") == "corpus.parquet: 3 utterances, 0.00 h; train 3\n"
    assert rows_of(Path("corpus.parquet")) == {
        each: {"text": text, "speaker": each[:4], "split": "train"} for each, text in TEXTS.items()
    }
    recordings.check_audio(load_corpus("corpus.parquet"))


@pytest.mark.parametrize("how", ["list", "temporal array"])
def test_class_ids_in_a_custom_field(recordings: Recordings, how: str) -> None:
    """Of a truncated cut its part, as ``cut.load_senones()`` gives it."""
    cuts = [cut_of(recordings, each) for each in TEXTS]
    with lhotse.NumpyFilesWriter("arrays") as writer:
        for cut in cuts:
            values = recordings.class_ids[cut.id]
            if how == "list":
                cut.senones = values.tolist()
            else:
                cut.senones = writer.store_array(cut.id, values, frame_shift=0.01, temporal_dim=0, start=0)
    expected = [recordings.class_ids[cut.id] for cut in cuts]
    if how == "temporal array":
        cuts.append(cuts[0].truncate(offset=0.05, duration=0.1).with_id("part"))
        expected.append(cuts[-1].load_senones())
    write_cuts(*cuts)
    assert "hard labels, of 5 classes, every 10 ms" in imported("train=cuts.jsonl.gz", "--alignment", "senones")
    corpus = load_corpus("corpus.parquet")
    for utterance, labels_T in zip(corpus, expected, strict=True):
        np.testing.assert_array_equal(utterance.hard_labels, labels_T)
    if how == "temporal array":
        assert (corpus[3].start_sample, corpus[3].num_samples, len(corpus[3].hard_labels)) == (800, 1600, 10)


def test_alignments_of_supervisions(recordings: Recordings) -> None:
    """Symbols with times; of a cut from the middle of a recording too, where lhotse counts from the recording's start."""
    items = [
        lhotse.supervision.AlignmentItem("SIL", 0.0, 0.034),
        lhotse.supervision.AlignmentItem("T", 0.034, 0.071),
        lhotse.supervision.AlignmentItem("UW", 0.115, 0.085),
    ]
    cut = cut_of(recordings, "anna-1", alignment={"phone": items})
    write_cuts(cut, cut.truncate(offset=0.1, duration=0.1).with_id("part"))
    imported("train=cuts.jsonl.gz", "--alignment", "phone")
    inventory = ClassInventory.load("inventory.json")
    assert inventory == ClassInventory(names=("SIL", "T", "UW"), phones=("SIL", "T", "UW"), silence_phones=("SIL",))
    corpus = load_corpus("corpus.parquet")
    # 4,000 samples are 25 frames, the last five after the last phone.
    expected = [0] * 3 + [1] * 7 + [-1] + [2] * 9 + [-1] * 5
    assert corpus[0].hard_labels is not None
    assert corpus[0].hard_labels.tolist() == expected
    assert corpus[1].hard_labels is not None
    assert corpus[1].hard_labels.tolist() == expected[10:20]


@pytest.mark.parametrize("item", [["AA", float("nan"), 0.1], ["AA", 0.0, float("inf")], ["AA", float("-inf"), 1.0]])
def test_alignments_with_times_that_are_not_finite(recordings: Recordings, item: list[Any]) -> None:
    cut = cut_of(recordings, "anna-1").to_dict()
    cut["supervisions"][0]["alignment"] = {"phone": [item]}
    Path("cuts.jsonl").write_text(json.dumps(cut))
    message = refused("train=cuts.jsonl", "--alignment", "phone")
    assert message == (
        "error: cuts.jsonl cannot be imported:\n  cuts whose 'phone' has times that are not finite: 1 (anna-1)\n"
    )


def test_several_supervisions_are_one_utterance(recordings: Recordings) -> None:
    cut = cut_of(recordings, "anna-1")
    (first,) = cut.supervisions
    cut.supervisions = [
        lhotse.utils.fastcopy(first, id="b", start=0.1, text="two", speaker="carl"),
        lhotse.utils.fastcopy(first, id="a", text="one"),
        lhotse.utils.fastcopy(first, id="c", start=0.2, text=None),
    ]
    write_cuts(cut)
    imported("train=cuts.jsonl.gz")
    assert rows_of(Path("corpus.parquet")) == {"anna-1": {"text": "one two", "speaker": None, "split": "train"}}


def test_what_cannot_be_an_utterance(recordings: Recordings, tmp_path: Path) -> None:
    cut = cut_of(recordings, "anna-1")
    command = cut_of(recordings, "anna-2")
    command.recording.sources[0].type, command.recording.sources[0].source = "command", "touch executed"
    faster = cut_of(recordings, "bert-1").perturb_speed(0.9)
    broken = json.dumps({"id": "no-recording", "type": "MonoCut", "start": 0, "duration": 1})
    write_cuts(cut, command, faster, cut.pad(1.0).with_id("padded"), name="cuts.jsonl")
    supervision = json.dumps({"id": "a-supervision", "recording_id": "r", "start": 0, "duration": 1, "channel": 0})
    with Path("cuts.jsonl").open("a") as file:
        file.write(f"{broken}\n{supervision}\n")
    assert refused("train=cuts.jsonl") == (
        "error: cuts.jsonl cannot be imported:\n"
        "  cuts whose audio is not a file or a URL (commands are not run; cuts.save_audios makes files): 1 (anna-2)\n"
        "  cuts with transforms of the audio, such as another speed or rate (cuts.save_audios makes files): 1 "
        "(bert-1_sp0.9)\n"
        "  cuts of type MixedCut, expected MonoCut (one recording, one channel): 1 (padded)\n"
        "  cuts that are malformed: 1 (no-recording: KeyError 'recording')\n"
        "  recordings or supervisions, expected cuts ('lhotse cut simple' makes them of both): 1 (a-supervision)\n"
    )
    assert not Path("executed").exists()


ARRAY = {"storage_type": "numpy_files", "storage_path": "a", "storage_key": "b.npy", "shape": [25]}
MANIFEST = {"array": ARRAY, "temporal_dim": 0, "frame_shift": 0.01, "start": 0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5], "cuts whose 'senones' is not a row of class ids: 1 (anna-1)"),
        ([[1], [2]], "cuts whose 'senones' is not a row of class ids: 1 (anna-1)"),
        ([3 << 32], "cuts whose 'senones' is not a row of class ids: 1 (anna-1)"),
        (
            MANIFEST | {"array": ARRAY | {"storage_type": "memory_raw"}},
            "arrays stored as memory_raw, expected numpy_files (NumpyFilesWriter): 1 (anna-1)",
        ),
        (MANIFEST | {"frame_shift": 0.04}, "arrays with frames of 40 ms, expected 10 (--frame-shift-ms): 1 (anna-1)"),
        (MANIFEST, "a/b.npy does not exist"),
        (MANIFEST | {"start": 0.5, "array": ARRAY | {"storage_path": "."}}, "cuts that begin before"),
        (
            MANIFEST | {"start": float("inf"), "array": ARRAY | {"storage_path": "."}},
            "cuts that are malformed: 1 (anna-1: OverflowError ",
        ),
        (
            MANIFEST | {"array": ARRAY | {"storage_path": ".", "storage_key": "zip.npy"}},
            "cuts that are malformed: 1 (anna-1: ValueError not a .npy array: ",
        ),
        (
            MANIFEST | {"array": ARRAY | {"storage_path": ".", "storage_key": "one.npy"}},
            "arrays of a single value, expected one for each frame: 1 (anna-1)",
        ),
        ([0, (1 << 20) + 1], "alignments with class ids above 1048576, which need --inventory: 1 (anna-1)"),
        (None, "cuts.jsonl: no cut has the custom field or the alignment 'senones'"),
    ],
)
def test_bad_alignments(recordings: Recordings, value: Any, message: str) -> None:
    np.save("b.npy", np.zeros(25, np.int32))
    np.save("one.npy", np.int32(3))
    Path("zip.npy").write_bytes(b"PK\x03\x04")
    cut = cut_of(recordings, "anna-1").to_dict() | {"custom": {"senones": value}}
    Path("cuts.jsonl").write_text(json.dumps(cut) + "\n")
    assert message in refused("train=cuts.jsonl", "--alignment", "senones")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{}\n", 'cuts.jsonl, line 1: not a cut of a Lhotse manifest, a JSON object with an "id"'),
        (b"\n[1, 2]\n", "cuts.jsonl, line 1: not a cut of a Lhotse manifest"),
        (b'{"source": "https://host/a.wav?sig=planted', "cuts.jsonl, line 1: not a cut of a Lhotse manifest"),
        (b"\xff\xfe", "cuts.jsonl is not a Lhotse manifest of JSON lines"),
        (b"", "cuts.jsonl has no utterances"),
        (None, "cuts.jsonl does not exist"),
    ],
)
def test_other_files(recordings: Recordings, data: bytes | None, message: str) -> None:
    if data is not None:
        Path("cuts.jsonl").write_bytes(data)
    found = refused("train=cuts.jsonl")
    assert found.startswith(f"error: {message}")
    assert "planted" not in found


@pytest.mark.parametrize("position", [0, 10, -8])
def test_damaged_gzip(recordings: Recordings, position: int) -> None:
    """In its head, its data and its checksum."""
    data = bytearray(gzip.compress(b"{}\n"))
    data[position] ^= 0xFF
    Path("cuts.jsonl.gz").write_bytes(data)
    assert "cuts.jsonl.gz is not a Lhotse manifest of JSON lines: " in refused("train=cuts.jsonl.gz")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_with_what_is_no_end_of_a_line(recordings: Recordings, end: str) -> None:
    cut = cut_of(recordings, "anna-1").to_dict()
    cut["supervisions"][0]["text"] = "one\u2028two\x85three"
    line = json.dumps(cut, ensure_ascii=False)
    Path("cuts.jsonl").write_bytes(f"{line}{end}{end}".encode())
    imported("train=cuts.jsonl")
    assert [each.text for each in load_corpus("corpus.parquet")] == ["one\u2028two\x85three"]


def test_a_speaker_may_be_a_number(recordings: Recordings) -> None:
    """As LibriSpeech's are."""
    cut = cut_of(recordings, "anna-1").to_dict()
    cut["supervisions"][0]["speaker"] = 17
    Path("cuts.jsonl").write_text(json.dumps(cut))
    imported("train=cuts.jsonl")
    assert load_corpus("corpus.parquet")[0].speaker == "17"


@pytest.mark.parametrize("source", [None, 17, ["a.wav"]])
def test_a_source_that_is_not_text(recordings: Recordings, source: object) -> None:
    cut = cut_of(recordings, "anna-1").to_dict()
    cut["recording"]["sources"][0]["source"] = source
    Path("cuts.jsonl").write_text(json.dumps(cut))
    message = "cuts whose source of the audio is not text, expected a path or a URL: 1 (anna-1)"
    assert message in refused("train=cuts.jsonl")


def test_a_credential_is_not_shown(recordings: Recordings) -> None:
    """That of an array neither."""
    cut = cut_of(recordings, "anna-1").to_dict()
    array = ARRAY | {"storage_path": "https://host", "storage_key": "b.npy?sig=planted"}
    cut["custom"] = {"senones": MANIFEST | {"array": array}}
    cut["recording"]["sources"] = [
        {"type": "url", "channels": [0], "source": "https://host/a.wav?X-Amz-Signature=planted"}
    ]
    Path("cuts.jsonl").write_text(json.dumps(cut))
    for args, message in (
        ([], "audio where the https:// URL holds a credential"),
        (["--alignment", "senones"], "anna-1: InputError the https:// URL holds a credential"),
    ):
        result = import_lhotse("train=cuts.jsonl", *args)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "planted" not in result.output


def test_the_sample_rate_is_the_files(recordings: Recordings) -> None:
    write_cuts(cut_of(recordings, "anna-1"))
    imported("train=cuts.jsonl.gz")
    assert load_corpus("corpus.parquet")[0].sample_rate == RATE
