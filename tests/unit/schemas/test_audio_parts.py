"""Utterances that are parts of a recording, or lie in an archive: manifests of version 2."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from softlabel_schemas import InputError, Utterance, load_corpus, write_corpus
from softlabel_schemas.corpus_file import CorpusFile
from softlabel_schemas.corpus_schema import SCHEMA, VERSION_1
from softlabel_schemas.front_end import Fbank, Waveform
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.recordings import rows_by_recording
from softlabel_schemas.utterance_reader import UtteranceError, UtteranceReader

FBANK = Fbank()
RATE = 16_000
# Two seconds, each sample its own number.
SAMPLES = np.arange(-RATE, RATE, dtype=np.int16)


def encoded(samples: np.ndarray, form: str = "WAV") -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, samples, RATE, format=form)
    return sink.getvalue()


def segment(utterance_id: str = "u1", **fields: Any) -> Utterance:
    row = {"audio": "a.wav", "sample_rate": RATE, "num_samples": 4_000, "split": "train", "start_sample": 8_000}
    return Utterance(utterance_id=utterance_id, **(row | fields))


def samples_of(folder: Path, *utterances: Utterance) -> list[np.ndarray]:
    write_corpus(folder / "c.parquet", utterances)
    corpus = load_corpus(folder / "c.parquet")
    reader = UtteranceReader(corpus)
    return [reader.samples(utterance, FBANK) for utterance in corpus]


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("start", [0, 1, 8_000, 28_000])
def test_a_segment_is_read_from_its_recording(tmp_path: Path, form: str, start: int) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(SAMPLES, form))
    (found,) = samples_of(tmp_path, segment(start_sample=start))
    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    np.testing.assert_array_equal(found, 32_768 * whole[start : start + 4_000])


@pytest.mark.parametrize(("form", "subtype"), [("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS")])
def test_formats_that_cannot_be_read_from_the_middle(tmp_path: Path, form: str, subtype: str) -> None:
    """After a seek the MP3 of a ramp is decoded as silence; whole files are read."""
    soundfile.write(tmp_path / "a.wav", SAMPLES, RATE, format=form, subtype=subtype)
    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    (found,) = samples_of(tmp_path, segment(start_sample=None, num_samples=len(whole)))
    # soundfile.read seeks to the start first, after which the MP3 decoder's last bits are others.
    np.testing.assert_allclose(found, whole * np.float32(32_768), atol=0.01)
    with pytest.raises(
        UtteranceError, match=f"a.wav is a recording in {subtype}, which cannot be read from the middle"
    ):
        samples_of(tmp_path, segment())


def test_a_member_of_an_archive_is_a_range_of_bytes(tmp_path: Path) -> None:
    audio = encoded(SAMPLES, "FLAC")
    (tmp_path / "a.tar").write_bytes(b"x" * 512 + audio + b"y" * 100)
    whole = segment(
        audio="a.tar", audio_offset=512, audio_bytes=len(audio), num_samples=len(SAMPLES), start_sample=None
    )
    whole = replace(whole, sha256=hashlib.sha256(audio).hexdigest())
    part = replace(whole, utterance_id="u2", num_samples=100, start_sample=31_900)
    found = samples_of(tmp_path, whole, part)
    np.testing.assert_array_equal(found[0], SAMPLES)
    np.testing.assert_array_equal(found[1], SAMPLES[-100:])


@pytest.mark.parametrize("front_end", [FBANK, Waveform()], ids=lambda front_end: front_end.kind)
def test_a_recording_is_read_once_for_all_its_segments(tmp_path: Path, front_end: Fbank | Waveform) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(SAMPLES))
    write_corpus(tmp_path / "c.parquet", [segment("u1"), segment("u2", start_sample=0), segment("u3", sha256="0" * 64)])
    corpus = load_corpus(tmp_path / "c.parquet")
    reader = UtteranceReader(corpus)
    reader.features(corpus[0], [front_end])
    (tmp_path / "a.wav").unlink()
    expected = front_end.compute(SAMPLES[:4_000].astype(np.float32))
    np.testing.assert_array_equal(reader.features(corpus[1], [front_end])[0], expected)
    # Each row's digest is compared all the same.
    with pytest.raises(UtteranceError, match="the corpus manifest says 0000000000000000"):
        reader.features(corpus[2], [front_end])


def test_threads_that_want_one_recording_fetch_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(SAMPLES))
    write_corpus(tmp_path / "c.parquet", [segment(f"u{index}", start_sample=index) for index in range(8)])
    corpus = load_corpus(tmp_path / "c.parquet")
    reader, fetches, together = UtteranceReader(corpus), list[str](), threading.Barrier(8)
    read = ObjectStore.read

    def slow_read(self: ObjectStore, key: str, *, max_bytes: int | None = None) -> bytes:
        fetches.append(key)
        time.sleep(0.05)
        return read(self, key, max_bytes=max_bytes)

    def samples(utterance: Utterance) -> np.ndarray:
        together.wait(timeout=30)
        return reader.samples(utterance, FBANK)

    monkeypatch.setattr(ObjectStore, "read", slow_read)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(samples, corpus))
    assert fetches == ["a.wav"]
    for index, of_utterance in enumerate(found):
        np.testing.assert_array_equal(of_utterance, SAMPLES[index : index + 4_000])


class TestRowsByRecording:
    def of(self, folder: Path, rows: list[tuple[str, float, bool]], min_seconds: float) -> list[list[int]]:
        """``rows``: location, seconds, and whether it is a part."""
        write_corpus(
            folder / "c.parquet",
            [
                segment(f"u{index}", audio=audio, num_samples=int(RATE * seconds), start_sample=0 if is_part else None)
                for index, (audio, seconds, is_part) in enumerate(rows)
            ],
        )
        return [group.tolist() for group in rows_by_recording(load_corpus(folder / "c.parquet"), min_seconds)]

    def test_files_are_one_group(self, tmp_path: Path) -> None:
        assert self.of(tmp_path, [(f"{index}.wav", 1.0 + index, False) for index in range(5)], 2.0) == [[0, 1, 2, 3, 4]]

    def test_a_recording_is_in_one_group_wherever_its_parts_are(self, tmp_path: Path) -> None:
        rows = [("a", 1.0, True), ("b", 2.0, True), ("a", 3.0, True), ("c", 9.0, True), ("b", 1.5, True)]
        assert self.of(tmp_path, rows, 3.5) == [[3], [0, 2], [1, 4]]

    def test_recordings_with_little_speech_share_a_group(self, tmp_path: Path) -> None:
        rows = [("a", 1.0, True), ("b", 1.0, True), ("file", 5.0, False), ("c", 1.0, True), ("d", 0.5, True)]
        assert self.of(tmp_path, rows, 3.0) == [[2], [0, 1, 3], [4]]

    def test_a_range_of_an_archive_is_a_recording(self, tmp_path: Path) -> None:
        rows = [segment(f"u{i}", audio="a.tar", audio_offset=512 * (i % 2), audio_bytes=9) for i in range(4)]
        write_corpus(tmp_path / "c.parquet", rows)
        found = rows_by_recording(load_corpus(tmp_path / "c.parquet"), 0.1)
        assert [group.tolist() for group in found] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"start_sample": 28_001},
            r"\(16000, 3999, 1\) from sample 28001 on, the corpus manifest says \(16000, 4000, 1\)",
        ),
        ({"start_sample": 90_000}, r"\(16000, 0, 1\) from sample 90000 on"),
        ({"audio_offset": 40_000, "audio_bytes": 99_999}, "a.wav ends before byte 139999"),
        ({"audio_offset": 0, "audio_bytes": 1 << 40}, "a.wav has more than"),
        ({"audio_offset": 8, "audio_bytes": 2_000}, "a.wav is not readable audio"),
        ({"audio": "b.wav", "audio_offset": 8, "audio_bytes": 2_000}, "b.wav does not exist"),
    ],
)
def test_a_part_that_is_not_there(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(SAMPLES))
    with pytest.raises(UtteranceError, match=f"utterance u1: .*{message}"):
        samples_of(tmp_path, segment(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start_sample": -1}, "start_sample is negative"),
        ({"audio_offset": -1, "audio_bytes": 3}, "audio_offset is negative"),
        ({"audio_offset": 0, "audio_bytes": 0}, "audio_bytes is not positive"),
        ({"audio_offset": 0}, "audio_offset and audio_bytes are not both given"),
        ({"audio_bytes": 7}, "audio_offset and audio_bytes are not both given"),
        ({"audio": None, "features": "a.npy"}, "a part of the audio is given, and no audio"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"c.parquet: row 1 \(utterance_id 'u2'\): {message}"):
        write_corpus(tmp_path / "c.parquet", [segment(), segment("u2", **fields)])


class TestManifest:
    def test_the_version_is_that_of_the_contents(self, tmp_path: Path) -> None:
        """Readers of yesterday read what has no parts."""
        for start, version, schema in ((None, b"1", VERSION_1), (0, b"2", SCHEMA)):
            write_corpus(tmp_path / "c.parquet", [segment("u0", start_sample=None), segment(start_sample=start)])
            stored = pq.read_schema(tmp_path / "c.parquet")
            assert (stored.names, stored.metadata[b"softlabels.corpus_version"]) == (schema.names, version)
            assert [each.start_sample for each in load_corpus(tmp_path / "c.parquet")] == [None, start]

    @pytest.mark.parametrize("version", [b"3", b"", b"2"])
    def test_another_version(self, tmp_path: Path, version: bytes) -> None:
        write_corpus(tmp_path / "c.parquet", [segment(start_sample=None)])
        table = pq.read_table(tmp_path / "c.parquet")
        pq.write_table(table.replace_schema_metadata({b"softlabels.corpus_version": version}), tmp_path / "c.parquet")
        for load in (load_corpus, lambda path: CorpusFile(path).scan(60.0)):
            with pytest.raises(InputError, match=r"c\.parquet is not a corpus manifest"):
                load(tmp_path / "c.parquet")

    def test_the_digest_covers_where_a_segment_starts_and_not_where_the_audio_lies(self, tmp_path: Path) -> None:
        def digest(*utterances: Utterance) -> str:
            write_corpus(tmp_path / "c.parquet", utterances)
            found = load_corpus(tmp_path / "c.parquet").digest
            assert CorpusFile(tmp_path / "c.parquet").scan(60.0).digest == found
            return found

        first = segment("u0", start_sample=None)
        assert len({digest(first, segment(start_sample=start)) for start in (None, 0, 1, 8_000)}) == 4
        inside = replace(segment(), audio="a.tar", audio_offset=512, audio_bytes=9_000)
        assert digest(first, inside) == digest(first, segment())
        # As it was before there were parts, whatever other splits have.
        whole = replace(first, split="dev")
        alone = digest(whole)
        digest(whole, segment())
        assert load_corpus(tmp_path / "c.parquet").select_splits(["dev"]).digest == alone
        assert CorpusFile(tmp_path / "c.parquet", ["dev"]).scan(60.0).digest == alone

    @pytest.mark.parametrize("change", [{"audio_offset": 7}, {"audio_bytes": 7}, {"start_sample": 7}])
    def test_a_manifest_that_changes_during_a_job_is_noticed(self, tmp_path: Path, change: dict[str, int]) -> None:
        row = segment(audio_offset=1, audio_bytes=1)
        write_corpus(tmp_path / "c.parquet", [row])
        file = CorpusFile(tmp_path / "c.parquet")
        file.scan(60.0)
        assert file.read(0, 1)[0] == row
        write_corpus(tmp_path / "c.parquet", [replace(row, **change)])
        with pytest.raises(InputError, match="changed while the job was running"):
            file.read(0, 1)


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_audio_on_an_object_store(new_url: Callable[[str], str], store: str, tmp_path: Path) -> None:
    """Files, segments of files and members of archives; what labelling and training read audio with."""
    from softlabel_schemas.object_store import ObjectStore

    url, audio = new_url(store), encoded(SAMPLES, "FLAC")
    ObjectStore(url).put("audio/a.flac", audio)
    ObjectStore(url).put("a.tar", b"x" * 512 + audio)
    whole = segment("u0", audio=f"{url}/audio/a.flac", num_samples=len(SAMPLES), start_sample=None)
    rows = (
        whole,
        replace(whole, utterance_id="u1", num_samples=50, start_sample=31_000),
        replace(whole, utterance_id="u2", audio=f"{url}/a.tar", audio_offset=512, audio_bytes=len(audio)),
    )
    found = samples_of(tmp_path, *rows)
    np.testing.assert_array_equal(found[0], SAMPLES)
    np.testing.assert_array_equal(found[1], SAMPLES[31_000:31_050])
    np.testing.assert_array_equal(found[2], SAMPLES)
