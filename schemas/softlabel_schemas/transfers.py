"""A transfer over a network can be damaged, stored bytes stay as they are: what is found damaged is fetched once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.object_store import ObjectStore

ResultT = TypeVar("ResultT")


def undamaged(store: ObjectStore, read: Callable[[], ResultT]) -> ResultT:
    """``read()``, once more where it finds damage and a transfer may have done it."""
    try:
        return read()
    except IntegrityError:
        if store.is_local:
            raise
    return read()
