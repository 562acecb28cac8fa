"""``deprecated.json``: says of a published dataset that it should not be used any more, why, and what to use instead.

The labels stay as they are and can be read; who opens them to train, describe or verify is told. The notice may be replaced,
and is withdrawn by deleting the object.
"""

from __future__ import annotations

from typing import Annotated

import click
from pydantic import AfterValidator

from softlabel_schemas import layout
from softlabel_schemas.about import Line
from softlabel_schemas.commit import read_manifest
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.manifest import from_bytes, to_bytes
from softlabel_schemas.object_store import ObjectStore, refuse_credentials
from softlabel_schemas.strict import StrictModel, printable

_MAX_BYTES = 1 << 16
# As long as a line may be.
_MAX_PROBLEM = 200


def _address(text: str) -> str:
    refuse_credentials(text)
    return text


class Deprecation(StrictModel):
    """``use``: the address of the dataset to use instead, a URL or a name."""

    reason: Line
    use: Annotated[Line, AfterValidator(_address)] | None = None

    def sentence(self) -> str:
        return f"deprecated: {self.reason}" + (f"; use {self.use}" if self.use else "")


def deprecate(store: ObjectStore, deprecation: Deprecation) -> None:
    """Raises InputError where nothing is published, IntegrityError where the manifest is damaged."""
    try:
        read_manifest(store)
    except FileNotFoundError:
        raise InputError(
            f"{store.url} is not a published dataset ({layout.MANIFEST} does not exist); check the URL"
        ) from None
    store.put(layout.DEPRECATED, to_bytes(deprecation))


def read_deprecation(store: ObjectStore) -> Deprecation | None:
    """None where the dataset is not deprecated. Raises IntegrityError where the notice is damaged, PermissionError where it may
    not be read."""
    data = store.read_if_there(layout.DEPRECATED, max_bytes=_MAX_BYTES)
    return None if data is None else from_bytes(Deprecation, data, where=store.describe(layout.DEPRECATED))


def deprecation_of(store: ObjectStore) -> Deprecation | None:
    """:func:`read_deprecation`, but of a notice that cannot be read, a newer writer's perhaps, the reason is why: who put it
    there wanted to warn, and the labels are as good as they were.
    """
    try:
        return read_deprecation(store)
    except (IntegrityError, PermissionError) as error:
        problem = printable(str(error).removeprefix(f"{store.url}/"), _MAX_PROBLEM)
        return Deprecation(reason=f"its notice cannot be read: {problem}"[:_MAX_PROBLEM])


def warn_if_deprecated(store: ObjectStore) -> Deprecation | None:
    """:func:`deprecation_of`; says so on stderr."""
    found = deprecation_of(store)
    if found is not None:
        click.echo(f"warning: {store.url} is {found.sentence()}", err=True)
    return found
