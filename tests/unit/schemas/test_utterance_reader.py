"""Reading the audio and features of a corpus: what is made of them, and every refusal."""

from __future__ import annotations

import hashlib
import io
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from softlabel_schemas import Corpus, InputError, Utterance, load_corpus, write_corpus
from softlabel_schemas.front_end import Fbank, Precomputed
from softlabel_schemas.utterance_reader import UtteranceError, UtteranceReader
from tests.support.memory import in_own_process

FBANK = Fbank()
STORED = Precomputed(num_features=4, frame_shift_ms=10.0)


def write_and_load(path: Path, utterance: Utterance) -> Corpus:
    write_corpus(path, [utterance])
    return load_corpus(path)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., np.ndarray]:
    """Writes one second of noise or the given file, and reads it through a corpus whose row may be changed."""

    def write_and_read(front_end: Fbank | Precomputed, data: bytes | None = None, **row: Any) -> np.ndarray:
        if data is not None:
            (tmp_path / "utterance").write_bytes(data)
        location = {"audio" if isinstance(front_end, Fbank) else "features": "utterance"}
        fields = {"utterance_id": "u1", "sample_rate": 16_000, "num_samples": 16_000, "split": "train"}
        corpus = write_and_load(tmp_path / "c.parquet", Utterance(**fields | location | row))
        return UtteranceReader(corpus).features(corpus[0], [front_end])[0]

    return write_and_read


def wav(num_samples: int = 16_000, sample_rate: int = 16_000, channels: int = 1) -> bytes:
    samples = np.random.default_rng(0).integers(-9_000, 9_000, (num_samples, channels), dtype=np.int16)
    sink = io.BytesIO()
    soundfile.write(sink, samples, sample_rate, format="WAV")
    return sink.getvalue()


def npy(array: Any, **kwargs: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, **kwargs)
    return sink.getvalue()


def npz(array: Any) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, array)
    return sink.getvalue()


def flac(num_samples: int, *, says: int | None = None) -> bytes:
    """Silence, a thousandth of its size in memory; ``says`` replaces the number of samples in its header."""
    sink = io.BytesIO()
    with soundfile.SoundFile(sink, "w", 16_000, 1, "PCM_16", format="FLAC") as file:
        for start in range(0, num_samples, 1 << 20):
            file.write(np.zeros(min(1 << 20, num_samples - start), dtype=np.int16))
    data = bytearray(sink.getvalue())
    if says is not None:
        # 36 bits in the STREAMINFO block.
        data[21:26] = bytes([data[21] & 0xF0 | says >> 32]) + (says & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


def float_wav(*values: float) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, np.array(values * 8_000, dtype=np.float32), 16_000, format="WAV", subtype="FLOAT")
    return sink.getvalue()


def npy_header(header: str, values: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header.encode() + b"\n" + values


def npy_of(shape: str, descr: str = "'<f4'") -> bytes:
    return npy_header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", bytes(96))


FEATURES = np.arange(24, dtype=np.float32).reshape(6, 4)


class TestReading:
    @pytest.mark.parametrize("num_samples", [80, 159, 240, 4_001, 16_000])
    @pytest.mark.parametrize("stack", [1, 3])
    def test_audio_gives_the_frames_that_num_frames_says(
        self, read: Callable[..., np.ndarray], num_samples: int, stack: int
    ) -> None:
        front_end = Fbank(stack=stack)
        features_TD = read(front_end, wav(num_samples), num_samples=num_samples)
        assert features_TD.shape == (front_end.num_frames(num_samples), 40 * stack)
        assert features_TD.dtype == np.float32
        assert np.isfinite(features_TD).all()

    def test_loud_samples(self, read: Callable[..., np.ndarray]) -> None:
        """Just within what is taken; floats are not always within 1."""
        assert np.isfinite(read(FBANK, float_wav(9e9, -9e9))).all()

    def test_normalised_features(self, read: Callable[..., np.ndarray]) -> None:
        features_TD = read(FBANK, wav())
        np.testing.assert_allclose(features_TD.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(features_TD.std(axis=0), 1, atol=1e-3)
        raw_TD = read(Fbank(normalize="none"), wav())
        np.testing.assert_array_equal(read(Fbank(normalize="none"), wav()), raw_TD)
        assert raw_TD.mean() > 5

    def test_stored_features(self, read: Callable[..., np.ndarray]) -> None:
        np.testing.assert_array_equal(read(STORED, npy(FEATURES)), FEATURES, strict=True)

    def test_the_right_sha256(self, read: Callable[..., np.ndarray]) -> None:
        assert len(read(FBANK, wav(), sha256=hashlib.sha256(wav()).hexdigest())) == 100

    @pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16"])
    def test_a_codec_that_cannot_seek(self, read: Callable[..., np.ndarray], subtype: str) -> None:
        sink = io.BytesIO()
        soundfile.write(sink, np.zeros(16_000, np.int16), 16_000, subtype, format="WAV")
        num_samples = soundfile.info(io.BytesIO(sink.getvalue())).frames
        assert len(read(FBANK, sink.getvalue(), num_samples=num_samples)) == FBANK.num_frames(num_samples)

    def test_what_soundfile_does_not_take(
        self, read: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It raises ValueError of its own, beside the errors of libsndfile."""

        def fail(*_: object, **__: object) -> None:
            raise ValueError("not this file")

        monkeypatch.setattr(soundfile.SoundFile, "read", fail)
        with pytest.raises(UtteranceError, match=r"^utterance u1: utterance is not readable audio: not this file$"):
            read(FBANK, wav())

    def test_several_front_ends_read_one_file(self, tmp_path: Path) -> None:
        (tmp_path / "u.wav").write_bytes(wav())
        (tmp_path / "u.npy").write_bytes(npy(FEATURES))
        row = Utterance(
            utterance_id="u",
            audio="u.wav",
            features="u.npy",
            # Of the audio, where there are both.
            sha256=hashlib.sha256(wav()).hexdigest(),
            sample_rate=16_000,
            num_samples=16_000,
            split="train",
        )
        corpus = write_and_load(tmp_path / "c.parquet", row)
        found = UtteranceReader(corpus).features(corpus[0], [FBANK, STORED, Fbank(num_mel_bins=80, stack=3)])
        assert [each.shape for each in found] == [(100, 40), (6, 4), (34, 240)]


REFUSALS: dict[str, tuple[Fbank | Precomputed, bytes | None, dict[str, Any], str]] = {
    "a missing file": (FBANK, None, {}, "utterance u1: utterance does not exist"),
    "no audio": (
        FBANK,
        None,
        {"audio": None, "features": "x.npy"},
        "the front end 'fbank' needs audio, the corpus gives none",
    ),
    "no features": (
        STORED,
        None,
        {"features": None, "audio": "x.wav"},
        "the front end 'precomputed' needs features, the corpus gives none",
    ),
    "a changed file": (
        FBANK,
        wav(),
        {"sha256": "0" * 64},
        f"utterance has sha256 {hashlib.sha256(wav()).hexdigest()[:16]}..., the corpus manifest says 0000000000000000...",
    ),
    "no audio file": (FBANK, b"RIFF", {}, "utterance is not readable audio: "),
    "a file of another sample rate": (
        FBANK,
        wav(sample_rate=8_000),
        {},
        "(sample rate, samples, channels) (8000, 16000, 1), the corpus manifest says (16000, 16000, 1)",
    ),
    "another number of samples": (
        FBANK,
        wav(num_samples=15_999),
        {},
        "(16000, 15999, 1), the corpus manifest says (16000, 16000, 1)",
    ),
    "stereo": (FBANK, wav(channels=2), {}, "(16000, 16000, 2), the corpus manifest says (16000, 16000, 1)"),
    "a sample rate of another front end": (
        FBANK,
        wav(sample_rate=8_000),
        {"sample_rate": 8_000},
        "sample rate is 8000 Hz, the front end expects 16000 Hz",
    ),
    "less than half a frame shift": (
        FBANK,
        wav(num_samples=79),
        {"num_samples": 79},
        "79 samples are less than half a frame shift",
    ),
    "text": (STORED, b"1 2 3 4", {}, "utterance is not a .npy array: "),
    "nothing": (STORED, b"", {}, "utterance is not a .npy array: "),
    "a cut array": (STORED, npy(FEATURES)[:-1], {}, "utterance is not a .npy array: "),
    "pickled objects": (
        STORED,
        npy(np.array([{}, []], dtype=object), allow_pickle=True),
        {},
        "features are object, expected float32",
    ),
    "audio cut off": (FBANK, wav()[:20_000], {}, "(16000, 9978, 1), the corpus manifest says (16000, 16000, 1)"),
    "compressed audio cut off": (FBANK, flac(16_000)[:-10], {}, "utterance is not readable audio: "),
    "audio that does not say how long it is": (
        FBANK,
        flac(16_000, says=0),
        {},
        "the corpus manifest says (16000, 16000, 1)",
    ),
    "audio that says it is longer than it is": (FBANK, flac(16_000, says=16_001), {}, "(16000, 16001, 1), the corpus"),
    "samples that are no numbers": (FBANK, float_wav(0.5, np.nan), {}, "utterance has samples that are not finite"),
    "samples that overflow": (FBANK, float_wav(0.5, 1e36), {}, "samples that are not finite or beyond 1e+10"),
    "infinite samples": (FBANK, float_wav(0.5, np.inf), {}, "utterance has samples that are not finite"),
    "a file too large for its row": (
        FBANK,
        bytes((16 << 20) + 8 * 100 + 1),
        {"num_samples": 100},
        "utterance has more than 16778016 bytes, too many for the 0.00625 s that the corpus manifest says",
    ),
    "features too large for their row": (
        STORED,
        bytes((16 << 20) + 4 * 4 * 101 + 1),
        {"num_samples": 80},
        "utterance has more than 16778832 bytes, too many for the 0.005 s that the corpus manifest says",
    ),
    "a name that no file has": (FBANK, None, {"audio": "a\0b"}, "a\0b does not exist"),
    "a name too long for a file": (FBANK, None, {"audio": "a" * 300}, "cannot be the name of a file"),
    "an unknown protocol": (
        FBANK,
        None,
        {"audio": "nosuch://a/b.wav"},
        "nosuch://a/b.wav: cannot use the URL nosuch://a",
    ),
    "a protocol that acts on what it reads": (
        FBANK,
        None,
        {"audio": "reference://::file:///refs/b.wav"},
        "reference://::file:///refs/b.wav: cannot use the URL reference://::file:///refs: ",
    ),
    "more values than memory": (
        STORED,
        npy_of("(1000000000000, 4)"),
        {},
        "1000000000000 frames of features are too many",
    ),
    "more frames than seconds": (
        STORED,
        npy(np.zeros((301, 4), np.float32)),
        {},
        "301 frames of features are too many for the 1 s that the corpus manifest says, at 10 ms each",
    ),
    "a negative number of frames": (STORED, npy_of("(-6, 4)"), {}, "features have shape (-6, 4)"),
    "a header of another language": (STORED, npy_header("(" * 9000), {}, "utterance is not a .npy array: "),
    "a header that is too deep": (STORED, npy_of("(" + "-" * 9000 + "1, 4)"), {}, "utterance is not a .npy array: "),
    "a type that is none": (STORED, npy_of("(6, 4)", "()"), {}, "utterance is not a .npy array: "),
    "an unknown version": (STORED, npy(FEATURES).replace(b"Y\x01", b"Y\x09", 1), {}, "utterance is not a .npy array: "),
    "features that are no numbers": (
        STORED,
        npy(np.full((6, 4), np.nan, np.float32)),
        {},
        "utterance has values that are not finite",
    ),
    "several arrays": (STORED, npz(FEATURES), {}, "utterance is not a .npy array: "),
    "another width": (STORED, npy(FEATURES[:, :3]), {}, "features have shape (6, 3), expected [frames, 4]"),
    "one dimension": (STORED, npy(FEATURES[0]), {}, "features have shape (4,), expected [frames, 4]"),
    "no frames": (STORED, npy(FEATURES[:0]), {}, "features have shape (0, 4), expected [frames, 4]"),
    "strings": (STORED, npy(FEATURES.astype(str)), {}, "features are <U32, expected float32"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_unusable_utterance_is_refused(read: Callable[..., np.ndarray], name: str) -> None:
    front_end, data, row, message = REFUSALS[name]
    with pytest.raises(UtteranceError) as caught:
        read(front_end, data, **row)
    assert str(caught.value).startswith("utterance u1: ")
    assert message in str(caught.value)


def test_a_file_of_ten_hours_for_a_row_of_a_second(read: Callable[..., np.ndarray], tmp_path: Path) -> None:
    """Half an hour here. It is refused by its header: decoded, it would take 115 MB."""
    read(FBANK, wav())
    (tmp_path / "utterance").write_bytes(flac(30 * 60 * 16_000))
    message, peak = in_own_process(peak_of_refusal, tmp_path / "c.parquet")
    assert "(16000, 28800000, 1), the corpus manifest says (16000, 16000, 1)" in message
    assert peak < 40e6


def peak_of_refusal(path: Path) -> tuple[str, int]:
    """What is said of the first utterance, and the bytes that this took; for a process of its own."""
    corpus = load_corpus(path)
    tracemalloc.start()
    with pytest.raises(UtteranceError) as caught:
        UtteranceReader(corpus).features(corpus[0], [FBANK])
    return str(caught.value), tracemalloc.get_traced_memory()[1]


def test_a_file_system_that_this_machine_lacks_is_no_utterances_fault(read: Callable[..., np.ndarray]) -> None:
    """Another machine may have its package."""
    missing = next(name for name in ("dropbox", "gdrive", "oci") if not importable(name))
    with pytest.raises(InputError, match="cannot use the URL") as caught:
        read(FBANK, audio=f"{missing}://a/b.wav")
    assert not isinstance(caught.value, UtteranceError)


@pytest.mark.parametrize("front_end", [FBANK, STORED])
@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:9/missing.wav?sv=2024&sig=planted",
        "http://127.0.0.1:9/missing.wav?X-Amz-Signature=planted",
        "nosuch://u:planted@host/missing.wav",
    ],
)
def test_a_location_with_a_credential_is_no_reason_to_skip(
    tmp_path: Path, front_end: Fbank | Precomputed, location: str
) -> None:
    """The reason would be stored for good; and it is rarely the only one. It is refused as soon as the manifest is written; one
    may have been written by other means."""
    path, column = tmp_path / "corpus.parquet", "audio" if front_end is FBANK else "features"
    utterance = Utterance(
        utterance_id="u1", sample_rate=16_000, num_samples=16_000, split="train", **{column: "utterance"}
    )
    refusal = r"^utterance u1: the [a-z]*:// URL holds a credential"
    with pytest.raises(InputError, match=refusal) as written:
        write_corpus(path, [replace(utterance, **{column: location})])
    assert not path.exists()
    write_corpus(path, [utterance])
    table = pq.read_table(path)
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, table.schema.field(index), pa.array([location])), path)
    corpus = load_corpus(path)
    with pytest.raises(InputError, match=refusal) as caught:
        UtteranceReader(corpus).features(corpus[0], [front_end])
    assert not isinstance(caught.value, UtteranceError)
    assert "planted" not in str(caught.value) + str(written.value)


def importable(protocol: str) -> bool:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        return False
    return True


def test_stored_features_in_other_layouts(read: Callable[..., np.ndarray]) -> None:
    for data in (npy(np.asfortranarray(FEATURES)), npy(FEATURES) + b"more"):
        found_TD = read(STORED, data)
        np.testing.assert_array_equal(found_TD, FEATURES, strict=True)
        assert found_TD.flags.c_contiguous
        assert found_TD.flags.writeable
