"""``softlabels import kaldi``: data directories and archives of alignments, written by kaldi-native-io."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from softlabel_schemas import ClassInventory, load_corpus
from softlabel_schemas.cli import main
from softlabel_schemas.corpus import check_hard_labels
from tests.support.foreign_corpora import RATE, TEXTS, Recordings, make_recordings, rows_of, write_kaldi

kaldi_native_io = pytest.importorskip("kaldi_native_io", reason="pip install '.[kaldi]'")


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recordings:
    monkeypatch.chdir(tmp_path)
    found = make_recordings(tmp_path)
    write_kaldi(found, tmp_path / "data")
    return found


def import_kaldi(*args: str) -> Result:
    return CliRunner().invoke(main, ["import", "kaldi", *args, "--output", "corpus.parquet"])


def imported(*args: str) -> str:
    result = import_kaldi(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: str) -> str:
    result = import_kaldi(*args)
    assert result.exit_code == 2, result.output
    assert not Path("corpus.parquet").exists()
    return result.stderr


def write_alignments(wspecifier: str, alignments: dict[str, np.ndarray]) -> None:
    with kaldi_native_io.Int32VectorWriter(wspecifier) as writer:
        for key, values in alignments.items():
            writer.write(key, values.tolist())


def test_a_data_directory(recordings: Recordings) -> None:
    report = imported("train=data")
    assert report == "corpus.parquet: 3 utterances, 0.00 h; train 3\n"
    assert rows_of(Path("corpus.parquet")) == {
        each: {"text": text, "speaker": each[:4], "split": "train"} for each, text in TEXTS.items()
    }
    corpus = load_corpus("corpus.parquet")
    recordings.check_audio(corpus)
    assert corpus[0].audio == "audio/anna-1.flac"
    assert corpus.inventory_digest is None


def test_blank_lines_and_lines_of_windows(recordings: Recordings) -> None:
    for name in ("wav.scp", "text", "utt2spk"):
        path = Path("data", name)
        path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n") + b" \r\n\n")
    imported("train=data")
    assert rows_of(Path("corpus.parquet")) == {
        each: {"text": text, "speaker": each[:4], "split": "train"} for each, text in TEXTS.items()
    }


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x0b", "\x1e"])
def test_a_transcript_with_what_is_no_end_of_a_line(recordings: Recordings, character: str) -> None:
    Path("data/text").write_text(f"anna-1 one{character}two\n")
    imported("train=data")
    assert load_corpus("corpus.parquet")[0].text == f"one{character}two"


def test_two_splits(recordings: Recordings) -> None:
    (recordings.folder / "dev").mkdir()
    Path("dev/wav.scp").write_text(f"carl-1 {recordings.audio('bert-1')}\n")
    report = imported("train=data", "dev=dev")
    assert report == "corpus.parquet: 4 utterances, 0.00 h; train 3, dev 1\n1 have no text\n"
    assert (load_corpus("corpus.parquet")[3].split, load_corpus("corpus.parquet")[3].speaker) == ("dev", None)


def test_segments(recordings: Recordings) -> None:
    Path("data/segments").write_text("a anna-1 0.05 0.1\nb anna-1 0.1 0.6 1\nc bert-1 0.02 -1\nd bert-1 0 -1\n")
    Path("data/text").write_text("a eins\nb\n")
    Path("data/utt2spk").unlink()
    imported("train=data")
    corpus = load_corpus("corpus.parquet")
    whole = len(recordings.samples["bert-1"])
    # b goes beyond the end by 350 ms, which Kaldi cuts off.
    assert [(each.start_sample, each.num_samples) for each in corpus] == [
        (800, 800),
        (1600, 2400),
        (320, whole - 320),
        (None, whole),
    ]
    assert [each.text for each in corpus] == ["eins", "", None, None]


def test_segments_have_the_samples_that_kaldi_cuts_out(recordings: Recordings) -> None:
    """It cuts both ends off: here 176,416 to 259,375, where the rounded duration has 82,960 samples and a frame more."""
    soundfile.write("long.wav", np.zeros(17 * RATE, np.int16), RATE)
    Path("data/wav.scp").write_text("long long.wav\n")
    Path("data/segments").write_text("a long 11.026 16.211\nb long 0.00011 0.00499\nc long 16.00011 -1\n")
    Path("data/text").unlink()
    Path("data/utt2spk").unlink()
    write_alignments("ark:ali.ark", {"a": np.zeros(1 + (82_959 - 400) // 160, np.int32)})
    imported("train=data", "--alignment", "ali.ark")
    found = [(each.start_sample, each.num_samples) for each in load_corpus("corpus.parquet")]
    assert found == [(176_416, 82_959), (1, 78), (256_001, 15_999)]


@pytest.mark.parametrize("form", ["ark", "text ark", "scp", "gz", "two arks"])
def test_alignments(recordings: Recordings, form: str) -> None:
    ids = recordings.class_ids
    if form == "two arks":
        write_alignments("ark:ali.1.ark", {"anna-1": ids["anna-1"]})
        write_alignments("ark:ali.2.ark", {"else-1": ids["bert-1"], "anna-2": ids["anna-2"], "bert-1": ids["bert-1"]})
        given = ["--alignment", "ali.1.ark", "--alignment", "ali.2.ark"]
    else:
        write_alignments("ark,t:ali.ark" if form == "text ark" else "ark,scp:ali.ark,ali.scp", ids)
        Path("ali.gz").write_bytes(gzip.compress(Path("ali.ark").read_bytes()))
        given = ["--alignment", {"scp": "ali.scp", "gz": "ali.gz"}.get(form, "ali.ark")]
    report = imported("train=data", *given)
    assert "3 of them have hard labels, of 5 classes, every 10 ms\n" in report
    corpus = load_corpus("corpus.parquet")
    for utterance in corpus:
        np.testing.assert_array_equal(utterance.hard_labels, ids[utterance.utterance_id])
    inventory = ClassInventory.load("inventory.json")
    assert inventory.names == ("0", "1", "2", "3", "4")
    check_hard_labels(corpus, inventory, where="corpus")


def test_alignments_with_snipped_edges_and_stacked_frames(recordings: Recordings) -> None:
    """Kaldi's default: two frames fewer, of which ours at 10 ms are those shifted by one."""
    ids = {each: values[1:-1] for each, values in recordings.class_ids.items()}
    write_alignments("ark:ali.ark", ids)
    imported("train=data", "--alignment", "ali.ark", "--stack", "3")
    corpus = load_corpus("corpus.parquet")
    assert corpus.hard_label_frame_shift_ms == 30.0
    for utterance in corpus:
        labels = recordings.class_ids[utterance.utterance_id].copy()
        labels[0], labels[-1] = labels[1], labels[-2]
        middle = labels[1::3] if len(labels) % 3 != 1 else np.append(labels[1::3], labels[-1])
        np.testing.assert_array_equal(utterance.hard_labels, middle)


def test_utterances_without_an_alignment_have_no_hard_labels(recordings: Recordings) -> None:
    write_alignments("ark:ali.ark", {"bert-1": recordings.class_ids["bert-1"]})
    assert "1 of them have hard labels" in imported("train=data", "--alignment", "ali.ark")
    assert load_corpus("corpus.parquet")[0].hard_labels is None


def test_an_inventory_that_is_given(recordings: Recordings) -> None:
    write_alignments("ark:ali.ark", recordings.class_ids)
    names = tuple("abcdef")
    Path("classes.json").write_bytes(ClassInventory(names=names).to_json())
    imported("train=data", "--alignment", "ali.ark", "--inventory", "classes.json")
    assert load_corpus("corpus.parquet").inventory_digest == ClassInventory(names=names).digest()
    assert not Path("inventory.json").exists()
    Path("corpus.parquet").unlink()
    Path("classes.json").write_bytes(ClassInventory(names=names[:4]).to_json())
    message = refused("train=data", "--alignment", "ali.ark", "--inventory", "classes.json")
    assert "alignments with class ids that are not -1 to 3: 3 (anna-1, anna-2, bert-1)" in message


def test_an_inventory_is_not_replaced(recordings: Recordings) -> None:
    write_alignments("ark:ali.ark", recordings.class_ids)
    Path("inventory.json").write_bytes(ClassInventory(names=("a",)).to_json())
    assert "inventory.json holds other classes than these 5" in refused("train=data", "--alignment", "ali.ark")


class TestRefused:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("anna-3 https://host/a.wav?sv=2024&sig=planted\n", "audio where the https:// URL holds a credential"),
            ("https://host/a.wav?sv=2024&sig=planted\n", "lines of wav.scp that have no value: 1 (line 4)"),
        ],
    )
    def test_a_credential_is_not_shown(self, recordings: Recordings, line: str, message: str) -> None:
        with Path("data/wav.scp").open("a") as file:
            file.write(line)
        result = import_kaldi("train=data")
        assert result.exit_code == 2
        assert message in result.stderr
        assert "planted" not in result.output

    def test_everything_wrong_is_listed_once_by_kind(self, recordings: Recordings) -> None:
        lines = [f"piped-{index} sph2pipe -f wav {index}.sph |\n" for index in range(7)]
        with Path("data/wav.scp").open("a") as file:
            file.writelines([*lines, "packed wav.ark:1234\n", "anna-1 again.wav\n", "bare\n"])
        with Path("data/text").open("a") as file:
            file.write("nobody says this\n")
        assert refused("train=data") == (
            "error: data cannot be imported:\n"
            "  ids that occur more than once in wav.scp: 1 (anna-1)\n"
            "  lines of wav.scp that have no value: 1 (line 13)\n"
            "  recordings that are commands, which are not run (make audio files of them and name these in wav.scp): 7 "
            "(piped-0, piped-1, piped-2, piped-3, piped-4, ...)\n"
            "  recordings in Kaldi archives, which are not read (make audio files of them): 1 (packed)\n"
            "  utterances in text without audio (utils/fix_data_dir.sh removes them): 1 (nobody)\n"
        )

    def test_segments(self, recordings: Recordings) -> None:
        Path("data/segments").write_text(
            "a anna-1 0.05 x\nb nobody 0 1\nanna-1 anna-1\nanna-2 anna-2 0 1\nbert-1 bert-1 0 1\n"
        )
        message = refused("train=data")
        assert "lines of segments that are not UTTERANCE RECORDING START END: 2 (a, anna-1)\n" in message
        assert "segments of recordings that wav.scp lacks: 1 (b)\n" in message

    def test_segments_outside_their_recordings(self, recordings: Recordings) -> None:
        Path("data/segments").write_text(
            "a anna-1 0.1 0.8\nb anna-1 0.2 0.2\nc anna-1 9 -1\nd anna-1 0.2 0.7\ne anna-1 nan 1\n"
            "f anna-1 1e308 2\ng anna-1 -1e308 1e308\n"
        )
        Path("data/text").unlink()
        Path("data/utt2spk").unlink()
        message = refused("train=data")
        assert message.endswith(
            "train=data cannot be imported:\n"
            "  segments outside their recordings, or empty: 3 (a, b, c)\n"
            "  segments whose times are no finite numbers of samples: 3 (e, f, g)\n"
        )

    def test_segments_of_mp3(self, recordings: Recordings) -> None:
        soundfile.write(recordings.audio("anna-1"), recordings.samples["anna-1"], RATE, format="MP3")
        Path("data/segments").write_text("a anna-1 0.1 0.2\nb anna-1 0 -1\n")
        Path("data/text").unlink()
        Path("data/utt2spk").unlink()
        assert "segments of MP3 or Opus recordings, which cannot be read from the middle (make FLAC): 1 (a)" in refused(
            "train=data"
        )

    def test_audio(self, recordings: Recordings) -> None:
        recordings.audio("anna-1").unlink()
        recordings.audio("anna-2").write_bytes(b"RIFF")
        soundfile.write(recordings.audio("bert-1"), np.zeros((99, 2)), RATE)
        message = refused("train=data")
        assert f"  audio files that do not exist: 1 ({recordings.audio('anna-1')})\n" in message
        assert "  audio files that are not readable (" in message
        assert f"  audio files with 2 channels, expected 1: 1 ({recordings.audio('bert-1')})\n" in message

    def test_ids_in_two_sources_and_a_source_without_a_split(self, recordings: Recordings) -> None:
        message = refused("train=data", "dev=data")
        assert "utterance ids that occur more than once: 3 (anna-1, anna-2, bert-1)" in message
        assert "utterances without a split (give it as SPLIT=SOURCE): 3" in refused("data")

    def test_alignments_of_another_length(self, recordings: Recordings) -> None:
        write_alignments("ark:ali.ark", {each: values[:-3] for each, values in recordings.class_ids.items()})
        message = refused("train=data", "--alignment", "ali.ark")
        assert (
            "alignments that do not fit the audio at 10 ms a frame: 3 (anna-1: 22 frames, expected 25 (23 with"
            in message
        )

    def test_alignments_of_others(self, recordings: Recordings) -> None:
        write_alignments("ark:ali.ark", {"else": np.zeros(3, np.int32)})
        assert "the alignments are of other utterances, such as else" in refused("train=data", "--alignment", "ali.ark")

    def test_no_data_directory(self, recordings: Recordings) -> None:
        assert "audio has no wav.scp; give a Kaldi data directory" in refused("train=audio")

    @pytest.mark.parametrize("name", ["segments", "text", "utt2spk"])
    @pytest.mark.parametrize(
        ("target", "message"),
        [("gone", "is no file, but a link to what does not exist"), (None, "Too many levels of symbolic links")],
    )
    def test_a_file_that_cannot_be_read_is_not_absent(
        self, recordings: Recordings, name: str, target: str | None, message: str
    ) -> None:
        path = Path("data", name)
        path.unlink(missing_ok=True)
        path.symlink_to(target or name)
        answer = refused("train=data")
        assert (message in answer, f"data/{name}" in answer) == (True, True)

    @pytest.mark.parametrize(
        "name", ["cut.ark", "cut.gz", "junk.ark", "away.scp", "gone.ark", "piped.scp", "touch x |"]
    )
    def test_damaged_archives_and_commands(self, recordings: Recordings, name: str) -> None:
        """A truncated archive looks like a shorter one."""
        write_alignments("ark,scp:ali.ark,ali.scp", recordings.class_ids)
        data = Path("ali.ark").read_bytes()
        Path("cut.ark").write_bytes(data[:-4])
        Path("cut.gz").write_bytes(gzip.compress(data)[:-4])
        Path("junk.ark").write_text("this is text\n")
        Path("away.scp").write_text("anna-1 away.ark:5\n")
        Path("piped.scp").write_text("anna-1 touch executed |\n")
        message = refused("train=data", "--alignment", name)
        expected = {
            "cut.gz": "cut.gz is not a whole gzip file",
            "gone.ark": "alignments gone.ark do not exist",
            "touch x |": "alignments touch x | do not exist",
            "piped.scp": "piped.scp has a command, which is not run: 'anna-1 touch executed |'",
        }.get(name, f"{name} is not a whole archive of integer vectors")
        assert f"error: {expected}" in message
        assert not Path("executed").exists()

    def test_an_alignment_given_twice(self, recordings: Recordings) -> None:
        write_alignments("ark:ali.ark", recordings.class_ids)
        message = refused("train=data", "--alignment", "ali.ark", "--alignment", "ali.ark")
        assert "ali.ark: utterance 'anna-1' has an alignment already" in message


def test_the_manifest_is_written_beside_the_audio_it_names(recordings: Recordings) -> None:
    """Below its folder relative, elsewhere absolute; with the digest of each file."""
    result = CliRunner().invoke(main, ["import", "kaldi", "train=data", "--output", "made/corpus.parquet"])
    assert result.exit_code == 0, result.output
    corpus = load_corpus("made/corpus.parquet")
    assert corpus[0].audio == str(recordings.audio("anna-1"))
    recordings.check_audio(corpus)
    assert corpus[0].sha256 == hashlib.sha256(recordings.audio("anna-1").read_bytes()).hexdigest()
