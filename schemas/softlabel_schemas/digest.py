"""Canonical JSON, sealed documents, and the content digest.

*Sealed*: every JSON document of a dataset is stored as the canonical form of ``{"body": ..., "sha256": ...}``, the
digest being that of the canonical body. A reader re-serialises what it parsed and compares bytes, so that any changed
bit is noticed, even one that leaves the JSON equivalent.

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

from softlabel_schemas.errors import IntegrityError

NUM_LANES = 1024


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON: sorted keys, no white space, no NaN. Equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def seal(body: Any) -> bytes:
    """The stored form of a document; ``body`` is anything JSON can hold."""
    return canonical_json({"body": body, "sha256": sha256_hex(canonical_json(body))})


def unseal(data: bytes, *, where: str) -> Any:
    """The body of a sealed document.

    Raises:
        IntegrityError: not JSON, not sealed, or not the bytes that :func:`seal` writes for its body.
    """
    try:
        document = json.loads(data)
        body = document["body"]
        resealed = seal(body)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise IntegrityError(f"{where}: not a sealed JSON document ({error}); it is damaged or not ours") from None
    if resealed != data:
        found, expected = document.get("sha256"), sha256_hex(canonical_json(body))
        raise IntegrityError(f"{where}: bytes were changed after writing (sha256 expected {expected}, found {found})")
    return body


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
        return cls(base64.b64decode(text, validate=True))

    def hexdigest(self) -> str:
        return sha256_hex(self._lanes.tobytes())
