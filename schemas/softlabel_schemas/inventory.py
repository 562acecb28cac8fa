"""ClassInventory: what each output of the acoustic models stands for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from softlabel_schemas.digest import canonical_json, check_num_values, parse_json, sha256_hex
from softlabel_schemas.errors import InputError
from softlabel_schemas.strict import StrictModel, parse, shortened


class ClassInventory(StrictModel):
    """Class id -> name, in order; ids are positions.

    Attributes:
        names: one unique name per class (senone, phone, token).
        phones: the phone each class belongs to, for phone error rates; empty where classes are not parts of phones.
        silence_phones: phones left out of a phone sequence.
        blank: the class of connectionist temporal classification (Graves et al., 2006) that stands for no token; None where
            the models were not trained with it.
    """

    names: tuple[str, ...]
    phones: tuple[str, ...] = ()
    silence_phones: tuple[str, ...] = ()
    # Left out of stored documents where None, so that inventories made before it keep their digests.
    blank: str | None = Field(default=None, exclude_if=lambda blank: blank is None)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.names:
            raise ValueError("an inventory needs at least one class")
        if len(set(self.names)) != len(self.names):
            repeated = Counter(self.names).most_common(1)[0][0]
            raise ValueError(f"class names must be unique, {shortened(repeated)} is repeated")
        if self.phones and len(self.phones) != len(self.names):
            raise ValueError(
                f"phones must be given for all {len(self.names)} classes or none, found {len(self.phones)}"
            )
        unknown = sorted(set(self.silence_phones) - set(self.phones))
        if unknown:
            raise ValueError(f"silence_phones {shortened(unknown)} are not phones of any class")
        if self.blank is not None and self.blank not in self.names:
            raise ValueError(f"blank {shortened(self.blank)} is not the name of a class")
        return self

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def blank_id(self) -> int:
        """Raises InputError where the inventory has no blank."""
        if self.blank is None:
            raise InputError(
                "the class inventory names no blank, which CTC needs; inventories of CTC teachers do, in inventory.json: "
                '"blank": "<name of the class>"'
            )
        return self.names.index(self.blank)

    def digest(self) -> str:
        """sha256 of the canonical JSON; part of every fingerprint."""
        return sha256_hex(canonical_json(self.model_dump(mode="json")))

    def phone_ids(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Sorted phone names, and the index into them of each class, int32 [num_classes].

        Raises:
            InputError: the inventory has no phones.
        """
        if not self.phones:
            raise InputError("the class inventory names no phones, so phone error rates cannot be computed")
        phones = tuple(sorted(set(self.phones)))
        index = {phone: position for position, phone in enumerate(phones)}
        return phones, np.array([index[phone] for phone in self.phones], dtype=np.int32)

    def to_json(self) -> bytes:
        """Raises InputError where it has more values than readers take."""
        data = canonical_json(self.model_dump(mode="json"))
        try:
            check_num_values(data)
        except ValueError as error:
            raise InputError(f"the class inventory cannot be stored: {error}") from None
        return data

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> ClassInventory:
        try:
            value = parse_json(data)
        except ValueError as error:
            raise InputError(f"{where} is not a class inventory: {error}") from None
        return parse(cls, value, where=where)

    @classmethod
    def load(cls, path: str | Path) -> ClassInventory:
        try:
            return cls.from_json(Path(path).read_bytes(), where=str(path))
        except FileNotFoundError:
            raise InputError(f"class inventory {path} does not exist") from None


def check_same_inventory(expected: ClassInventory, found: ClassInventory, *, expected_in: str, found_in: str) -> None:
    """Raises InputError with both class counts and digests unless the inventories are equal."""
    if expected.digest() != found.digest():
        raise InputError(
            f"class inventories differ: {expected_in} has {expected.num_classes} classes "
            f"(digest {expected.digest()[:12]}), {found_in} has {found.num_classes} (digest {found.digest()[:12]}); "
            "soft targets of one inventory mean nothing under another"
        )
