"""Canonical JSON, sealed documents, and the content digest.

*Sealed*: every JSON document of a dataset is stored as the canonical form of ``{"body": ..., "sha256": ...}``, the
digest being that of the canonical body. A reader compares the digest of the bytes before it parses them, so that any
changed bit is noticed, even one that leaves the JSON equivalent; then it writes the body again and compares, so that a
document has one form.

*Content digest*: LtHash (Bellare and Micciancio 1997; Lewi et al. 2019) over the utterances. A set hash was chosen
over a hash of hashes in order because it depends on the labels alone: not on shards, container, order of work or
attempt; two shards' states add up to that of their union. 1,024 lanes of 16 bits are needed for collision resistance,
which costs 2 kB in each commit record and nothing in the manifest.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import numpy as np

from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.limits import MAX_DOCUMENT_VALUES
from softlabel_schemas.strict import shortened

NUM_LANES = 1024

_HEAD, _TAIL = b'{"body":', b',"sha256":"'
_TAIL_LENGTH = len(_TAIL) + 64 + len(b'"}')


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON: sorted keys, no white space, no NaN. Equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def seal(body: Any) -> bytes:
    """The stored form of a document; ``body`` is anything JSON can hold. Raises InputError where it has too many values."""
    return seal_canonical(canonical_json(body))


def seal_canonical(canonical: bytes) -> bytes:
    """:func:`seal` for a body that is canonical JSON already."""
    try:
        check_num_values(canonical)
    except ValueError as error:
        raise InputError(
            f"a document cannot be stored: {error}; fewer shards or skipped utterances have less"
        ) from None
    return _HEAD + canonical + _TAIL + sha256_hex(canonical).encode() + b'"}'


def parse_json(data: bytes) -> Any:
    """The value of a JSON text that may be anything. Raises ValueError."""
    check_num_values(data)
    try:
        # Decoded here: from bytes, json would guess among UTF-8, UTF-16 and UTF-32.
        value = json.loads(data.decode())
        if b"\\ud" in data.lower():
            # Half of a surrogate pair is no text: it could not be written again.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
    return value


def check_num_values(data: bytes) -> None:
    """Raises ValueError for a JSON text of more values than readers take."""
    # Every value but the first follows one of these; in strings they count as well, which honest texts have room for.
    num_values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if num_values > MAX_DOCUMENT_VALUES:
        raise ValueError(f"a JSON document of {num_values} values, expected at most {MAX_DOCUMENT_VALUES}")


def unseal(data: bytes, *, where: str) -> bytes:
    """The body of a sealed document, as it was sealed; see :func:`parse_canonical`.

    Raises:
        IntegrityError: not sealed, or of more values than readers take.
    """
    body, found = data[len(_HEAD) : -_TAIL_LENGTH], data[-_TAIL_LENGTH:]
    if not data.startswith(_HEAD) or not found.startswith(_TAIL) or not found.endswith(b'"}'):
        raise IntegrityError(f"{where}: not a sealed JSON document; it is damaged or not ours")
    digest = sha256_hex(body)
    if found != _TAIL + digest.encode() + b'"}':
        raise IntegrityError(
            f"{where}: bytes were changed after writing (sha256 expected {digest}, found {found[len(_TAIL) : -2]!r})"
        )
    try:
        check_num_values(body)
    except ValueError as error:
        raise IntegrityError(f"{where}: {error}") from None
    return body


def parse_canonical(body: bytes, *, where: str) -> Any:
    """The value of a document's body.

    Raises:
        IntegrityError: not JSON, or not the bytes that :func:`canonical_json` writes for it.
    """
    try:
        value = parse_json(body)
        canonical = canonical_json(value)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: not a sealed JSON document ({shortened(str(error))}); it is not ours") from None
    if canonical != body:
        raise IntegrityError(f"{where}: its JSON is not in canonical form; it was not written by a writer of ours")
    return value


class LabelHash:
    """Order-free hash of a set of labelled utterances: the lane-wise sum of their expanded digests."""

    def __init__(self, state: bytes | None = None) -> None:
        if state is None:
            self._lanes = np.zeros(NUM_LANES, dtype="<u2")
        elif len(state) == 2 * NUM_LANES:
            self._lanes = np.frombuffer(state, dtype="<u2").copy()
        else:
            raise ValueError(f"a label hash state has {2 * NUM_LANES} bytes, found {len(state)}")

    def add_utterance(self, utterance_digest: bytes) -> None:
        """``utterance_digest``: sha256 of the utterance's canonical label bytes (see ``labels_digest``)."""
        expanded = hashlib.shake_128(utterance_digest).digest(2 * NUM_LANES)
        self._lanes += np.frombuffer(expanded, dtype="<u2")

    def update(self, other: LabelHash) -> None:
        self._lanes += other._lanes

    def to_base64(self) -> str:
        return base64.b64encode(self._lanes.tobytes()).decode("ascii")

    @classmethod
    def from_base64(cls, text: str) -> LabelHash:
        """Raises ValueError unless ``text`` is what :meth:`to_base64` gives."""
        label_hash = cls(base64.b64decode(text, validate=True))
        if label_hash.to_base64() != text:
            raise ValueError("a label hash is not in canonical base64")
        return label_hash

    def hexdigest(self) -> str:
        return sha256_hex(self._lanes.tobytes())
