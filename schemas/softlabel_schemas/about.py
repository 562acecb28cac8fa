"""``about.json``: what a dataset's maker says of it, and the software that made it.

It is no part of the labels: not of the fingerprint, not of the content digest. It may be replaced, and a dataset without it is
as good as any. A job writes it from its ``[description]`` when it begins, and again when it is run with another;
``softlabels about`` writes it for any dataset.
"""

from __future__ import annotations

from typing import Annotated

import click
from pydantic import AfterValidator, Field

from softlabel_schemas import layout
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.manifest import from_bytes, to_bytes
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.strict import StrictModel
from softlabel_schemas.version import SOFTWARE

# For people: what is longer belongs into a document of its own.
_MAX_ABOUT_BYTES = 1 << 20


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected one line of printable text")
    return text


def _lines(text: str) -> str:
    if not text.replace("\n", "").isprintable():
        raise ValueError("expected lines of printable text")
    return text


Line = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_line)]
Text = Annotated[str, Field(min_length=1, max_length=20_000), AfterValidator(_lines)]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]{2,8})*$")]


class Description(StrictModel):
    """What its maker says of a dataset. All of it is optional.

    Attributes:
        licence: of the labels; an SPDX identifier such as "CC-BY-4.0" where there is one.
        corpus: the name of the speech that was labelled.
        languages: of the speech, as BCP 47 codes: "en", "pt-BR".
        text: what the dataset is and what it is for.
        restrictions: what it must not be used for, whom the speech leaves out, known biases.
    """

    title: Line | None = None
    owner: Line | None = None
    licence: Line | None = None
    corpus: Line | None = None
    languages: Annotated[tuple[Language, ...], Field(max_length=1000)] = ()
    text: Text | None = None
    restrictions: Text | None = None


class About(StrictModel):
    """``about.json``. ``software``: name and version of what made the labels; None where it is not known."""

    software: Line | None = None
    description: Description = Description()


def read_about(store: ObjectStore) -> About | None:
    """None where the dataset has none. Raises IntegrityError where it is damaged, PermissionError where it may not be read."""
    data = store.read_if_there(layout.ABOUT, max_bytes=_MAX_ABOUT_BYTES)
    return None if data is None else from_bytes(About, data, where=store.describe(layout.ABOUT))


def read_about_or_warn(store: ObjectStore) -> About | None:
    """:func:`read_about`, but one that cannot be read, of a newer writer perhaps, is a warning on stderr: no label needs it."""
    try:
        return read_about(store)
    except (IntegrityError, PermissionError) as error:
        click.echo(f"warning: the description of the dataset is left out: {error}", err=True)
        return None


def write_about(store: ObjectStore, description: Description, *, software: str | None = SOFTWARE) -> None:
    """Write it, or replace its description; the software stays what it was the first time. Raises IntegrityError."""
    _write(store, read_about(store), description, software)


def begin_about(store: ObjectStore, description: Description) -> None:
    """Write it as a job does each time that it is run. One that says nothing leaves what was said since.

    Raises:
        IntegrityError: what is there is damaged.
    """
    found = read_about(store)
    if found is None or description != Description():
        _write(store, found, description, SOFTWARE)


def inherit_about(store: ObjectStore, about: About) -> None:
    """Write what is said of another dataset, unless something is said of this one, readable or not."""
    try:
        found = read_about(store)
    except (IntegrityError, PermissionError):
        return
    if found in (None, About()):
        store.put(layout.ABOUT, to_bytes(about))


def _write(store: ObjectStore, found: About | None, description: Description, software: str | None) -> None:
    wanted = About(software=found.software if found else software, description=description)
    if wanted != found:
        store.put(layout.ABOUT, to_bytes(wanted))
