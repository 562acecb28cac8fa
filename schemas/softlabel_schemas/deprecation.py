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
from softlabel_schemas.errors import InputError
from softlabel_schemas.manifest import from_bytes, to_bytes
from softlabel_schemas.object_store import ObjectStore, refuse_credentials
from softlabel_schemas.strict import StrictModel

_MAX_BYTES = 1 << 16


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
    """None where the dataset is not deprecated. Raises IntegrityError where the notice is damaged."""
    try:
        data = store.read(layout.DEPRECATED, max_bytes=_MAX_BYTES)
    except (FileNotFoundError, PermissionError):
        # To who may not list a bucket S3 says of what is not there that access to it is refused.
        return None
    return from_bytes(Deprecation, data, where=store.describe(layout.DEPRECATED))


def warn_if_deprecated(store: ObjectStore) -> None:
    """Says so on stderr."""
    found = read_deprecation(store)
    if found is not None:
        click.echo(f"warning: {store.url} is {found.sentence()}", err=True)
