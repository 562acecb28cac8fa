"""``softlabels import table`` and ``softlabels import webdataset``."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from softlabel_schemas import load_corpus
from softlabel_schemas.cli import main
from softlabel_schemas.object_store import ObjectStore
from tests.support.foreign_corpora import TEXTS, Recordings, make_recordings, rows_of


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recordings:
    monkeypatch.chdir(tmp_path)
    return make_recordings(tmp_path)


def softlabels_import(*args: str) -> Result:
    return CliRunner().invoke(main, ["import", *args, "--output", "corpus.parquet"])


def imported(*args: str) -> str:
    result = softlabels_import(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: str) -> str:
    result = softlabels_import(*args)
    assert result.exit_code == 2, result.output
    return result.stderr


class TestTable:
    @pytest.mark.parametrize("name", ["folder/rows.tsv", "folder/rows.csv"])
    def test_all_columns(self, recordings: Recordings, name: str) -> None:
        comma = "," if name.endswith("csv") else "\t"
        # A quotation mark is text where tabs separate, and quotes where commas do.
        text = '"say ""one"", two"' if name.endswith("csv") else 'say "one", two'
        ids = " ".join(map(str, recordings.class_ids["anna-1"]))
        rows = [
            ["utterance_id", "audio", "split", "speaker", "text", "start", "duration", "alignment", "age"],
            ["anna-1", "../audio/anna-1.flac", "train", "anna", text, "", "", ids, "7"],
            ["anna-2", str(recordings.audio("anna-2")), "dev", "", "", "0.05", "0.1", "", ""],
            ["bert-1", recordings.audio("bert-1").as_uri(), "dev", "", "", "0.05", "", "", ""],
        ]
        Path("folder").mkdir()
        Path(name).write_text("".join(comma.join(row) + "\n" for row in rows))
        assert "1 of them have hard labels, of 5 classes" in imported("table", name)
        assert rows_of(Path("corpus.parquet")) == {
            "anna-1": {"text": 'say "one", two', "speaker": "anna", "split": "train"},
            "anna-2": {"text": None, "speaker": None, "split": "dev"},
            "bert-1": {"text": None, "speaker": None, "split": "dev"},
        }
        corpus = load_corpus("corpus.parquet")
        np.testing.assert_array_equal(corpus[0].hard_labels, recordings.class_ids["anna-1"])
        lengths = len(recordings.samples["bert-1"]) - 800
        assert [(each.start_sample, each.num_samples) for each in corpus] == [
            (None, 4_000),
            (800, 1_600),
            (800, lengths),
        ]

    def test_the_split_of_the_command_line_counts(self, recordings: Recordings) -> None:
        Path("rows.tsv").write_text("utterance_id\taudio\tsplit\na\taudio/anna-1.flac\ttrain\n")
        result = softlabels_import("table", "test=rows.tsv")
        assert load_corpus("corpus.parquet")[0].split == "test"
        assert "warning: test=rows.tsv: of 1 utterances, such as a, the split column says otherwise" in result.stderr

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("utt\taudio\n", "rows.tsv has no column utterance_id (it has utt, audio); name them in its first line"),
            ("utterance_id audio\n", "(it has utterance_id audio); name them in its first line, with tabs between"),
            ("id\x1b[2J\taudio\n", "rows.tsv has no column utterance_id (it has id\\x1b[2J, audio);"),
            ("", "rows.tsv has no column utterance_id and no column audio (it has )"),
            ("utterance_id\taudio\n", "rows.tsv has no utterances"),
            ("utterance_id\taudio\na\nb\tc\td\n", "rows that have not 2 values: 2 (line 2, line 3)"),
            (
                "utterance_id\taudio\na\t\n\tb\n",
                "rows without audio: 1 (line 2)\n  rows without utterance_id: 1 (line 3)",
            ),
            (
                "utterance_id\taudio\tstart\talignment\na\tb\tx\t\nb\tb\t\t1 y\n",
                "rows with a start, duration or alignment that is no number: 2 (a, b)",
            ),
            (
                "utterance_id\taudio\tstart\na\taudio/anna-1.flac\t1e308\n",
                "segments whose times are no finite numbers of samples: 1 (a)",
            ),
            (
                "utterance_id\taudio\na\thttps://[host]/a.flac\n",
                "audio where a URL is malformed between :// and the path; expected a host or a bucket there: 1 (a)",
            ),
            (
                "utterance_id\taudio\na\thttps:///a.flac\nb\thttp://host:x/a.flac\n",
                "audio where a URL is malformed between :// and the path; expected a host or a bucket there: 2 (a, b)",
            ),
            ("utterance_id\taudio\na\tgone.flac\n", "audio files that do not exist: 1 (./gone.flac)"),
            ("utterance_id\taudio\na\tq\0.flac\n", "audio files that do not exist: 1 (./q\\x00.flac)"),
            (
                f"utterance_id\taudio\na\t{'a' * 300}\nb\tcircle\n",
                "audio files whose names are too long, or that are links in a circle: 2 (./aaa",
            ),
        ],
    )
    def test_bad_tables(self, recordings: Recordings, content: str, message: str) -> None:
        Path("rows.tsv").write_text(content)
        Path("circle").symlink_to("circle")
        assert message in refused("table", "train=rows.tsv")

    def test_a_byte_order_mark(self, recordings: Recordings) -> None:
        """As in what Excel saves as "CSV UTF-8"."""
        Path("rows.csv").write_text("utterance_id,audio\na,audio/anna-1.flac\n", encoding="utf-8-sig")
        imported("table", "train=rows.csv")
        assert load_corpus("corpus.parquet")[0].utterance_id == "a"

    @pytest.mark.parametrize("name", ["rows.tsv", "rows.csv"])
    def test_an_alignment_of_an_hour(self, recordings: Recordings, name: str) -> None:
        """Longer than the csv module takes by default, and than other tables may need."""
        samples = np.zeros(3600 * 1_000, np.int16)
        soundfile.write("hour.flac", samples, 1_000)
        comma, ids = "," if name.endswith("csv") else "\t", " ".join(["1"] * 360_000)
        rows = [["utterance_id", "audio", "split", "alignment"], ["a", "hour.flac", "train", ids]]
        Path(name).write_text("".join(comma.join(row) + "\n" for row in rows))
        limit = csv.field_size_limit()
        imported("table", name)
        np.testing.assert_array_equal(load_corpus("corpus.parquet")[0].hard_labels, np.ones(360_000))
        assert csv.field_size_limit() == limit

    @pytest.mark.parametrize(("content", "line"), [("utterance_id\taudio\na\tb\nb\t{}\n", 3), ("{}\taudio\n", 1)])
    def test_a_value_that_is_too_long(
        self, recordings: Recordings, monkeypatch: pytest.MonkeyPatch, content: str, line: int
    ) -> None:
        monkeypatch.setattr("softlabel_schemas.table_corpus._MAX_CHARACTERS", 100)
        Path("rows.tsv").write_text(content.format("x" * 101))
        limit = csv.field_size_limit()
        message = f"error: rows.tsv, line {line}: not a row of a table: field larger than field limit (100)\n"
        assert refused("table", "train=rows.tsv") == message
        assert csv.field_size_limit() == limit

    @pytest.mark.parametrize(
        ("source", "content", "message"),
        [
            (
                "rows.tsv",
                "utterance_id\taudio\na\t{}\nb\taudio/anna-1.flac\nc\t{}\n",
                "audio where the https:// URL holds a credential; leave it out and set it in the environment instead (for "
                "S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role): 2 (a, c)",
            ),
            ("rows.tsv", "a\t{}\n", "rows.tsv has no column utterance_id and no column audio (it has a, a URL)"),
            ("https://host/rows.tsv?sig=planted", "", "error: the https:// URL holds a credential"),
        ],
    )
    @pytest.mark.parametrize(
        "url",
        [
            "https://host/a.wav?sv=2024&sig=planted",
            "https://host/a.wav?X-Amz-Signature=planted",
            "https://u:planted@h/a.wav",
        ],
    )
    def test_a_credential_is_not_shown(
        self, recordings: Recordings, source: str, content: str, message: str, url: str
    ) -> None:
        Path("rows.tsv").write_text(content.format(url, url))
        result = softlabels_import("table", f"train={source}")
        assert result.exit_code == 2
        assert message in result.stderr
        assert "planted" not in result.output
        assert not Path("corpus.parquet").exists()

    def test_a_missing_package(self, recordings: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "soundfile", None)
        Path("rows.tsv").write_text("utterance_id\taudio\na\taudio/anna-1.flac\n")
        assert "pip install 'essence-distill[audio]'" in refused("table", "train=rows.tsv")

    def test_no_table(self, recordings: Recordings) -> None:
        assert "rows.txt is neither .tsv (tab-separated) nor .csv" in refused("table", "train=rows.txt")
        assert "gone.tsv does not exist" in refused("table", "train=gone.tsv")
        assert "--alignment is given 1 times; form 'table' takes 0" in refused("table", "a.tsv", "--alignment", "x")


def npy(values: object) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.asarray(values))
    return sink.getvalue()


def tar_of(members: Mapping[str, bytes], mode: str = "w") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return sink.getvalue()


# Members at 0 and 1536.
TWO = tar_of({"a.flac": bytes(600), "b.flac": bytes(600)})


def members_of(recordings: Recordings) -> dict[str, bytes]:
    members = {}
    for each, text in TEXTS.items():
        members[f"./set/{each}.flac"] = recordings.audio(each).read_bytes()
        members[f"./set/{each}.json"] = json.dumps({"text": text, "speaker": each[:4], "snr": 3}).encode()
        members[f"./set/{each}.alignment.npy"] = npy(recordings.class_ids[each])
        members[f"./set/{each}.png"] = b"an image"
    return members


class TestWebDataset:
    @pytest.mark.parametrize("store", ["local", "memory", "s3"])
    def test_shards(self, recordings: Recordings, store: str, new_url: Callable[[str], str]) -> None:
        """Audio is read in place, as a range of the archive's bytes, wherever that lies."""
        members, url = members_of(recordings), new_url(store)
        first = {name: data for name, data in members.items() if "anna-1" in name}
        ObjectStore(url).put("0.tar", tar_of(first))
        ObjectStore(url).put("1.tar", tar_of({name: data for name, data in members.items() if name not in first}))
        report = imported("webdataset", f"train={url}/0.tar", f"dev={url}/1.tar", "--stack", "3")
        assert "3 utterances, 0.00 h; train 1, dev 2\n3 of them have hard labels, of 5 classes, every 30 ms" in report
        corpus = load_corpus("corpus.parquet")
        assert [each.utterance_id for each in corpus] == [f"set/{each}" for each in TEXTS]
        assert [(each.text, each.speaker) for each in corpus] == [(text, each[:4]) for each, text in TEXTS.items()]
        recordings.samples.update({f"set/{each}": recordings.samples[each] for each in TEXTS})
        recordings.check_audio(corpus)

    def test_text_members(self, recordings: Recordings) -> None:
        audio = recordings.audio("anna-1").read_bytes()
        Path("a.tar").write_bytes(tar_of({"a.FLAC": audio, "a.txt": b"one\n", "b.flac": audio}))
        imported("webdataset", "train=a.tar")
        assert [each.text for each in load_corpus("corpus.parquet")] == ["one", None]

    def test_bad_members(self, recordings: Recordings) -> None:
        audio = recordings.audio("anna-1").read_bytes()
        members = {
            "mute.txt": b"who?",
            "a.wav": audio,
            "a.flac": audio,
            "b.flac": audio,
            "b.json": b"[1]",
            "c.flac": audio,
            "c.json": b"{",
            "d.flac": audio,
            "d.txt": b"\xff",
            "e.flac": audio,
            "e.alignment.npy": npy([0.5]),
            "g.flac": audio,
            "g.alignment.npy": npy([3 << 32]),
            "f.flac": audio,
            "f.alignment.npy": npy([{"pickled": 1}]),
            "h.flac": audio,
            "h.alignment.npy": b"PK\x03\x04",
            "i.flac": audio,
            "i.alignment.npy": b"",
            # Latin-1.
            "caf\udce9.wav": audio,
            "caf\udce9.png": b"an image",
        }
        Path("a.tar").write_bytes(tar_of(members))
        assert refused("webdataset", "train=a.tar") == (
            "error: a.tar cannot be imported:\n"
            "  members .json that are not readable: 2 (b.json, c.json)\n"
            "  members .txt that are not readable: 1 (d.txt)\n"
            "  members .alignment.npy that are not readable: 5 (e.alignment.npy, g.alignment.npy, f.alignment.npy, "
            "h.alignment.npy, i.alignment.npy)\n"
            "  members whose names are not UTF-8: 1 (caf\\udce9.wav)\n"
            "  utterances without audio (of flac, wav, ogg, mp3, opus): 1 (mute)\n"
            "  utterances with several audio files (of flac, wav, ogg, mp3, opus): 1 (a)\n"
        )

    def test_a_damaged_header_of_an_array(self, recordings: Recordings) -> None:
        """Of which NumPy's parser raises what it likes."""
        header = b"(" * 900 + b"\n"
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        Path("a.tar").write_bytes(tar_of({"a.wav": b"", "a.alignment.npy": data}))
        assert "members .alignment.npy that are not readable: 1 (a.alignment.npy)" in refused(
            "webdataset", "train=a.tar"
        )

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (tar_of({"a.flac": b"x"}, "w:gz"), "a.tar is not an uncompressed tar archive"),
            (b"text", "a.tar is not an uncompressed tar archive"),
            (tar_of({"a.flac": bytes(600)})[:1000], "a.tar is not an uncompressed tar archive: unexpected end of data"),
            (tar_of({"a.png": b"x"}), "a.tar has no utterances"),
            (TWO[:3072], "a.tar is not a whole tar archive: it is cut off at byte 3072, before the zeros"),
            (TWO[:1536] + b"x" + TWO[1537:], "a.tar is not one whole tar archive: at byte 1536 a member is damaged"),
            (TWO[:1600], "a.tar is not one whole tar archive: at byte 1536 a member is damaged"),
            (
                TWO + TWO,
                "a.tar is not one whole tar archive: at byte 3072 a member is damaged, or another archive follows",
            ),
            (None, "a.tar does not exist"),
        ],
        # Names of their own: those of the bytes would have the time in them, and differ between processes.
        ids=[
            *("compressed", "text", "cut", "without-utterances", "without-end", "damaged", "cut-in-header", "joined"),
            "missing",
        ],
    )
    def test_other_files(self, recordings: Recordings, data: bytes | None, message: str) -> None:
        if data is not None:
            Path("a.tar").write_bytes(data)
        assert refused("webdataset", "train=a.tar").startswith(f"error: {message}")
