"""Reads the audio or stored features of a corpus's utterances, each checked against its row, and makes features of them.

Files are other people's: they are read, and unpacked, only as far as the row accounts for.
"""

from __future__ import annotations

import errno
import hashlib
import io
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from softlabel_schemas.connection import STORAGE_PROTOCOLS
from softlabel_schemas.corpus import Corpus, Utterance
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.front_end import FULL_SCALE, AnyFrontEnd, Fbank, Float32, Precomputed, Waveform
from softlabel_schemas.lru import LruCache
from softlabel_schemas.object_store import ObjectStore

if TYPE_CHECKING:
    import soundfile

# Of float samples, which should be within 1; beyond, the power spectrum leaves float32.
_MAX_AMPLITUDE = 1e10
# A file is read, and its contents are unpacked, only as far as its row's duration accounts for. Audio of float64 has 8 bytes a
# sample, and the headers may hold a picture; stored features may have been made with another frame shift than they say.
_MAX_BYTES_PER_SAMPLE = 8
_MAX_HEADER_BYTES = 16 << 20
# Of a recording that an utterance is a part of the row says less: 18 hours of 16-bit samples at 16 kHz.
_MAX_RECORDING_BYTES = 2 << 30
# Recordings kept in memory, for the other utterances in them.
_KEPT_BYTES = 256 << 20
# A decoder of these that begins in the middle lacks what frames before hold of later ones: of MP3 it may give silence instead.
SERIAL_SUBTYPES = ("MPEG", "OPUS")
_MAX_FRAME_RATIO = 2
_MAX_EXTRA_FRAMES = 100
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    # Differs from 2.0 in the encoding of field names, which float32 does not have.
    (3, 0): np.lib.format.read_array_header_2_0,
}
# Location, and the range of bytes there.
_File = tuple[str, int | None, int | None]
# The location's fault, not the storage's.
BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)


class UtteranceError(InputError):
    """One utterance cannot be labelled, whatever machine tries; a job may skip it.

    The message is stored as the reason: it names no absolute path but the corpus's own, no time, no host and no address.
    """


class MissingFileError(UtteranceError):
    """Its file is not there. Where that is so of many, the machine may lack the storage that they lie on."""


class UtteranceReader:
    """Reads the audio or features of a corpus's utterances; keeps one utterance's file for several front ends, and recordings
    that several utterances are parts of."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._stores: dict[str, ObjectStore] = {}
        # With the digest of each.
        self._recordings: LruCache[_File, tuple[bytes, str]] = LruCache(_KEPT_BYTES)
        self._lock = threading.Lock()
        # Threads that want the same one fetch it once, and each keeps the one that it is at.
        self._fetching: dict[_File, Future[tuple[bytes, str]]] = {}
        self._own = threading.local()

    def features(self, utterance: Utterance, front_ends: list[AnyFrontEnd]) -> list[Float32]:
        """Features float32 [T, D] for each front end; the file is read once.

        Raises:
            UtteranceError: the file is missing, unreadable, or not what its row says; both values are given.
            InputError: the location holds a credential, or this machine cannot use it; no reason to skip the utterance.
        """
        data: dict[str, bytes] = {}
        samples: Float32 | None = None
        features = []
        for front_end in front_ends:
            location = _location(utterance, front_end)
            if location not in data:
                data[location] = self._read(utterance, location, front_end)
            if isinstance(front_end, Precomputed):
                features.append(_decode_features(utterance, data[location], front_end))
                continue
            _check_sample_rate(utterance, front_end)
            if samples is None:
                samples = _decode_audio(utterance, data[location])
            if isinstance(front_end, Fbank) and front_end.num_frames(len(samples)) == 0:
                raise UtteranceError(
                    f"utterance {utterance.utterance_id}: {len(samples)} samples are less than {front_end.shortest}"
                )
            features.append(front_end.compute(samples))
        return features

    def samples(self, utterance: Utterance, front_end: Fbank) -> Float32:
        """What ``front_end`` computes features of, float32 [N] in the range of 16-bit integers. Raises as :meth:`features`."""
        location = _location(utterance, front_end)
        _check_sample_rate(utterance, front_end)
        return _decode_audio(utterance, self._read(utterance, location, front_end))

    def _read(self, utterance: Utterance, location: str, front_end: AnyFrontEnd) -> bytes:
        """The file, once its sha256 is as the row says."""
        if isinstance(front_end, Precomputed) or utterance.start_sample is None:
            data, found = self._digested(utterance, location, front_end)
        else:
            data, found = self._recording(utterance, location, front_end)
        expected = utterance.sha256
        if expected is not None and found != expected and location == (utterance.audio or utterance.features):
            raise UtteranceError(
                f"utterance {utterance.utterance_id}: {location} has sha256 {found[:16]}..., the corpus manifest says "
                f"{expected[:16]}...; the file changed since the manifest was written"
            )
        return data

    def _recording(self, utterance: Utterance, location: str, front_end: AnyFrontEnd) -> tuple[bytes, str]:
        """With its sha256; fetched where it is not kept from before."""
        file = (location, utterance.audio_offset, utterance.audio_bytes)
        own: tuple[_File, tuple[bytes, str]] | None = getattr(self._own, "at", None)
        if own is not None and own[0] == file:
            return own[1]
        with self._lock:
            kept, fetching = self._recordings.get(file), self._fetching.get(file)
            if kept is None and fetching is None:
                self._fetching[file] = Future()
        if kept is None and fetching is not None:
            error = fetching.exception()
            # Of the other utterance, which it names; a store that does not answer is the same for all.
            if error is not None and not isinstance(error, UtteranceError):
                raise error
            kept = fetching.result() if error is None else self._digested(utterance, location, front_end)
        elif kept is None:
            kept = self._fetched(file, utterance, location, front_end)
        self._own.at = file, kept
        return kept

    def _fetched(self, file: _File, utterance: Utterance, location: str, front_end: AnyFrontEnd) -> tuple[bytes, str]:
        """For all threads that wait for it."""
        try:
            found = self._digested(utterance, location, front_end)
        except BaseException as error:
            with self._lock:
                self._fetching.pop(file).set_exception(error)
            raise
        self._recordings.put(file, found, len(found[0]))
        with self._lock:
            self._fetching.pop(file).set_result(found)
        return found

    def _digested(self, utterance: Utterance, location: str, front_end: AnyFrontEnd) -> tuple[bytes, str]:
        data = self._fetch(utterance, location, front_end)
        return data, hashlib.sha256(data).hexdigest()

    def _fetch(self, utterance: Utterance, location: str, front_end: AnyFrontEnd) -> bytes:
        if isinstance(front_end, Precomputed):
            max_bytes = _max_frames(utterance, front_end) * front_end.num_features * 4
        elif utterance.start_sample is not None:
            max_bytes = _MAX_RECORDING_BYTES
        else:
            max_bytes = utterance.num_samples * _MAX_BYTES_PER_SAMPLE
        max_bytes += _MAX_HEADER_BYTES
        try:
            folder, name = self._corpus.resolve(location)
        except InputError as error:
            raise InputError(f"utterance {utterance.utterance_id}: {error}") from None
        try:
            if "\0" in location:
                raise FileNotFoundError
            if folder not in self._stores:
                self._stores[folder] = ObjectStore(folder)
            store = self._stores[folder]
            if isinstance(front_end, Precomputed) or utterance.audio_bytes is None:
                return store.read(name, max_bytes=max_bytes)
            return _read_part(store, name, utterance, max_bytes)
        except FileNotFoundError:
            # The reason of a skipped utterance is stored: it names the location as the corpus does, not this machine's.
            raise MissingFileError(f"utterance {utterance.utterance_id}: {location} does not exist") from None
        except IntegrityError:
            is_part = max_bytes > _MAX_RECORDING_BYTES
            why = "a recording" if is_part else f"the {utterance.seconds:g} s that the corpus manifest says"
            raise UtteranceError(
                f"utterance {utterance.utterance_id}: {location} has more than {max_bytes} bytes, too many for {why}"
            ) from None
        except InputError as error:
            protocol = folder.partition("://")[0]
            if "://" not in folder or protocol in STORAGE_PROTOCOLS:
                # A package that this machine lacks, perhaps.
                raise
            raise UtteranceError(f"utterance {utterance.utterance_id}: {location}: {error}") from None
        except OSError as error:
            if error.errno not in BAD_NAMES:
                raise
            raise UtteranceError(
                f"utterance {utterance.utterance_id}: {location} cannot be the name of a file"
            ) from None


def _read_part(store: ObjectStore, name: str, utterance: Utterance, max_bytes: int) -> bytes:
    """The range of the bytes of an object that is the utterance's audio file."""
    assert utterance.audio_offset is not None
    assert utterance.audio_bytes is not None
    if utterance.audio_bytes > max_bytes:
        raise IntegrityError(f"{store.describe(name)}: a part of {utterance.audio_bytes} bytes")
    stop = utterance.audio_offset + utterance.audio_bytes
    data = store.read_range(name, utterance.audio_offset, stop)
    if len(data) != utterance.audio_bytes:
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {utterance.audio} ends before byte {stop}, up to which the corpus manifest "
            "says that the audio lasts"
        )
    return data


def _location(utterance: Utterance, front_end: AnyFrontEnd) -> str:
    location = utterance.features if isinstance(front_end, Precomputed) else utterance.audio
    if location is None:
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: the front end '{front_end.kind}' needs "
            f"{'features' if isinstance(front_end, Precomputed) else 'audio'}, the corpus gives none"
        )
    return location


def _check_sample_rate(utterance: Utterance, front_end: Fbank | Waveform) -> None:
    if utterance.sample_rate != front_end.sample_rate:
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: sample rate is {utterance.sample_rate} Hz, "
            f"the front end expects {front_end.sample_rate} Hz"
        )


def _max_frames(utterance: Utterance, front_end: Precomputed) -> int:
    return int(utterance.seconds * 1000 / front_end.frame_shift_ms * _MAX_FRAME_RATIO) + _MAX_EXTRA_FRAMES


def _decode_audio(utterance: Utterance, data: bytes) -> Float32:
    """float32 [N] in the range of 16-bit integers."""
    import soundfile

    start = utterance.start_sample
    expected = (utterance.sample_rate, utterance.num_samples, 1)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            num_samples = file.frames
            if start is not None:
                num_samples = min(max(num_samples - start, 0), utterance.num_samples)
            found = (file.samplerate, num_samples, file.channels)
            # Before it is decoded: ten hours of silence are a small file.
            if found == expected:
                if start is not None:
                    _check_seekable(utterance, file)
                    file.seek(start)
                # With their number: "all" needs a codec that can seek, which GSM 6.10 cannot.
                samples = file.read(num_samples, dtype="float32", always_2d=True)
                found = (file.samplerate, len(samples), file.channels)
    except UtteranceError:
        raise
    except (soundfile.SoundFileError, ValueError) as error:
        # The whole text of some of these errors has the address of an object in memory.
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {utterance.audio} is not readable audio: "
            f"{getattr(error, 'error_string', error)}"
        ) from None
    if found != expected:
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {utterance.audio} has (sample rate, samples, channels) {found}"
            f"{'' if start is None else f' from sample {start} on'}, the corpus manifest says {expected}"
        )
    # Of NaN, too, this is not so.
    if not (np.abs(samples) < _MAX_AMPLITUDE).all():
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {utterance.audio} has samples that are not finite or beyond "
            f"{_MAX_AMPLITUDE:g}"
        )
    return np.ascontiguousarray(samples[:, 0]) * FULL_SCALE


def _check_seekable(utterance: Utterance, file: soundfile.SoundFile) -> None:
    if file.subtype.startswith(SERIAL_SUBTYPES):
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {utterance.audio} is a recording in {file.subtype}, which cannot be read "
            "from the middle; make a FLAC file of it"
        )


def _decode_features(utterance: Utterance, data: bytes, front_end: Precomputed) -> Float32:
    file = io.BytesIO(data)
    try:
        # np.load would also take zip archives, and it allocates what the header asks for.
        read_header = _NPY_HEADERS[np.lib.format.read_magic(file)]
        sizes, is_fortran, dtype = read_header(file)
        shape = tuple(int(size) for size in sizes)
    except Exception as error:  # noqa: BLE001 - of a damaged header, of 10 kB at most, NumPy's parser may raise anything
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {utterance.features} is not a .npy array: {type(error).__name__}"
        ) from None
    if dtype != np.float32:
        raise UtteranceError(f"utterance {utterance.utterance_id}: features are {dtype}, expected float32")
    if len(shape) != 2 or shape[1] != front_end.num_features or not shape[0] > 0:
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: features have shape {shape}, "
            f"expected [frames, {front_end.num_features}]"
        )
    if shape[0] > _max_frames(utterance, front_end):
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {shape[0]} frames of features are too many for the "
            f"{utterance.seconds:g} s that the corpus manifest says, at {front_end.frame_shift_ms:g} ms each"
        )
    values, num_bytes = data[file.tell() :], 4 * shape[0] * shape[1]
    if len(values) < num_bytes:
        raise UtteranceError(
            f"utterance {utterance.utterance_id}: {utterance.features} is not a .npy array: it has {len(values)} bytes of "
            f"values, expected {num_bytes}"
        )
    features_TD = np.frombuffer(values[:num_bytes], dtype=np.float32).reshape(shape, order="F" if is_fortran else "C")
    if not np.isfinite(features_TD).all():
        raise UtteranceError(f"utterance {utterance.utterance_id}: {utterance.features} has values that are not finite")
    return np.array(features_TD, order="C")
