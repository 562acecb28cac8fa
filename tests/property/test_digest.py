"""Sealed documents and the content digest."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import IntegrityError
from softlabel_schemas.digest import NUM_LANES, LabelHash, canonical_json, parse_canonical, seal, unseal

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


def value_of(data: bytes) -> object:
    return parse_canonical(unseal(data, where="here"), where="here")


@given(json_values)
def test_unseal_undoes_seal(body: object) -> None:
    assert value_of(seal(body)) == body


def test_every_single_bit_flip_is_rejected() -> None:
    data = seal({"names": ["a", "ü"], "weight": 1e-05, "count": 10, "empty": None})
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(IntegrityError, match=r"^here: "):
            unseal(bytes(damaged), where="here")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'"body"',
        b'{"sha256":""}',
        b'{"body":NaN,"sha256":""}',
        b'{"body":"\\ud800","sha256":""}',
        b"[" * 100_000,
        seal({"a": 1}) + b"\n",
        seal({"a": 1}).replace(b":1", b": 1"),
        seal({"a": 1}).replace(b":1", b":1.0"),
        seal({"a": 1}).replace(b'"a":1', b'"a":2,"a":1'),
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_seal_did_not_write_is_rejected(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        value_of(data)


def test_canonical_json_is_one_form() -> None:
    assert canonical_json({"b": [1, 0.5], "a": "ü"}) == '{"a":"ü","b":[1,0.5]}'.encode()
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def hash_of(*digests: bytes) -> LabelHash:
    label_hash = LabelHash()
    for digest in digests:
        label_hash.add_utterance(digest)
    return label_hash


digest_lists = st.lists(st.binary(min_size=32, max_size=32), max_size=8)


@given(digest_lists, st.randoms())
def test_label_hash_is_free_of_order(digests: list[bytes], rng: object) -> None:
    shuffled = list(digests)
    rng.shuffle(shuffled)
    assert hash_of(*shuffled).hexdigest() == hash_of(*digests).hexdigest()


@given(digest_lists, digest_lists)
def test_label_hashes_of_two_parts_add_up(first: list[bytes], second: list[bytes]) -> None:
    total = hash_of(*first)
    total.update(LabelHash.from_base64(hash_of(*second).to_base64()))
    assert total.hexdigest() == hash_of(*first, *second).hexdigest()


@given(digest_lists, st.binary(min_size=32, max_size=32))
def test_label_hash_depends_on_every_utterance(digests: list[bytes], more: bytes) -> None:
    assert hash_of(*digests, more).hexdigest() != hash_of(*digests).hexdigest()


def test_label_hash_as_specified() -> None:
    digests = [hashlib.sha256(bytes([index])).digest() for index in range(3)]
    lanes = sum(
        np.frombuffer(hashlib.shake_128(digest).digest(2 * NUM_LANES), dtype="<u2").astype(int) for digest in digests
    )
    assert hash_of(*digests).hexdigest() == hashlib.sha256((lanes % 65_536).astype("<u2").tobytes()).hexdigest()


def test_a_state_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="2048 bytes, found 3"):
        LabelHash(b"123")
