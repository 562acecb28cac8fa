"""Kaldi archives: script files that strangers wrote, and posteriors that a disk has no room for."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from softlabel_schemas import InputError
from softlabel_schemas.kaldi_archives import read_alignments, write_posteriors
from softlabel_schemas.shard import LabelledUtterance
from tests.support.datasets import Written, random_rows, write_dataset
from tests.support.memory import in_own_process

kaldi_native_io = pytest.importorskip("kaldi_native_io", reason="pip install '.[kaldi]'")


class TestScriptFiles:
    @pytest.fixture(autouse=True)
    @staticmethod
    def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with kaldi_native_io.Int32VectorWriter("ark,scp:ali-1.ark,ali.scp") as writer:
            writer.write("anna-1", [1, 2, 3])

    @pytest.mark.parametrize(
        "location",
        [
            "touch executed |",
            "touch executed |[0:3]",
            "touch executed | [0:3]",
            "touch executed |\f",
            "| touch executed",
            "cat ali-1.ark | touch executed",
            # One line to Kaldi, two to Python.
            "\rtouch${IFS}executed;|[0:3]",
            "\u2028 touch executed |",
        ],
    )
    def test_commands(self, location: str) -> None:
        """Kaldi looks for the bar of a command where a range, which it takes off first, may hide it."""
        line = f"anna-1 {location}"
        Path("piped.scp").write_bytes(f"{line}\n".encode())
        with pytest.raises(InputError) as refused:
            read_alignments(["piped.scp"])
        assert str(refused.value) == (
            f"piped.scp has a command, which is not run: {line.strip()!r}; copy the alignments first"
        )
        assert not Path("executed").exists()

    @pytest.mark.parametrize("location", ["-", "-[0:3]"])
    def test_standard_input(self, location: str) -> None:
        Path("piped.scp").write_text(f"anna-1 {location}\n")
        with pytest.raises(InputError, match=r"piped\.scp has standard input, expected FILE or FILE:OFFSET: 'anna-1 -"):
            read_alignments(["piped.scp"])

    def test_bars_and_hyphens_that_are_none(self) -> None:
        Path("ali.scp").write_text("anna|1 ali-1.ark:7\n- ali-1.ark:7\n")
        assert {key: ids.tolist() for key, ids in read_alignments(["ali.scp"]).items()} == {
            "anna|1": [1, 2, 3],
            "-": [1, 2, 3],
        }

    def test_ids_that_are_not_utf_8(self) -> None:
        Path("ali.scp").write_bytes(b"M\xfcller ali-1.ark:7\n")
        with pytest.raises(InputError, match=r"ali\.scp has an utterance id that is not UTF-8: "):
            read_alignments(["ali.scp"])


class TestPosteriors:
    @pytest.fixture(scope="class")
    @classmethod
    def written(cls, tmp_path_factory: pytest.TempPathFactory) -> Written:
        return write_dataset(str(tmp_path_factory.mktemp("export") / "labels"), shard_format="zarr", codec="packed-f32")

    @pytest.mark.parametrize("name", ["a,b", "|touch executed;"])
    def test_a_folder_that_means_something_else(
        self, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="has a comma, at which Kaldi parts the names of two files, or a bar"):
            write_posteriors(written.utterances, Path(name), Path(name))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("share", [0.2, 0.99999])
    def test_a_full_disk(self, written: Written, tmp_path: Path, share: float) -> None:
        """Kaldi meets it when it writes an utterance, or when it closes the archive."""
        (tmp_path / "whole").mkdir()
        write_posteriors(written.utterances, tmp_path / "whole", tmp_path / "whole")
        limit = int(share * (tmp_path / "whole" / "post.ark").stat().st_size)
        assert limit > (tmp_path / "whole" / "post.scp").stat().st_size
        code = (
            "import resource, sys, kaldi_native_io; from softlabel_schemas.cli import main\n"
            # Of what is imported from here on, the bytecode would be cut as well.
            "sys.dont_write_bytecode = True\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            f"main(['export', {written.url!r}, '--to', 'kaldi', '--output', {str(tmp_path / 'post')!r}])"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert ran.returncode == 2, ran.stderr
        assert f"error: OSError: {tmp_path / 'post'}: the posteriors could not all be written" in ran.stderr
        assert list(tmp_path.iterdir()) == [tmp_path / "whole"]

    def test_memory_does_not_grow_with_the_script_file(self, tmp_path: Path) -> None:
        peak = in_own_process(_peak_of_posteriors, tmp_path)
        assert peak < (tmp_path / "post.scp").stat().st_size / 2


def _peak_of_posteriors(folder: Path) -> int:
    """Bytes that Python holds at most while it writes a script file of 1.1 MB."""
    empty = random_rows()[-2]
    assert isinstance(empty, LabelledUtterance)
    utterances = (replace(empty, utterance_id=f"utt-{index:04d}") for index in range(5000))
    tracemalloc.start()
    write_posteriors(utterances, folder, Path("/", "x" * 200))
    return tracemalloc.get_traced_memory()[1]
