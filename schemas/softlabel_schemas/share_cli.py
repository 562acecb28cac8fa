"""The commands of ``softlabels`` for names, and for what is said of a dataset beside its labels."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import click

from softlabel_schemas.about import Description, write_about
from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.deprecation import Deprecation, deprecate, warn_if_deprecated
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.names import NameRecord, located, resolve, tag, wanted_address
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.strict import load_toml, parse


@click.command("tag")
@click.argument("url")
@click.argument("name")
def tag_command(url: str, name: str) -> None:
    """Give the published dataset at URL a version of NAME: PREFIX#NAME, or PREFIX#NAME:VERSION.

    Without a version it is the next one. URL lies under PREFIX. A version never changes hands. Readers give the name in the
    place of a URL, and PREFIX#NAME is the highest version; training files should name the version.

    \b
    Example:
      softlabels tag s3://bucket/team/labels-2 s3://bucket/team#english
    """
    address, found = wanted_address(name), located(url)[0]
    click.echo(_line(address.prefix, tag(found, address), found))


@click.command("resolve")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def resolve_command(name: str, as_json: bool) -> None:
    """Say which dataset NAME, PREFIX#NAME or PREFIX#NAME:VERSION, leads to.

    \b
    Example:
      softlabels resolve s3://bucket/team#english
    """
    address = wanted_address(name)
    url, record = resolve(address)
    if as_json:
        facts = {"url": url, **record.model_dump(mode="json", exclude={"path"})}
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(_line(address.prefix, record, url))
    warn_if_deprecated(ObjectStore(url))


@click.command("about")
@click.argument("url")
@click.argument("description", type=click.Path())
def about_command(url: str, description: str) -> None:
    """Say of the published dataset at URL what DESCRIPTION holds: a TOML file with the keys of a job's [description].

    It replaces what was said before. For datasets that were combined, or made without a description; one that a job makes
    gets it from the job.

    \b
    Example:
      softlabels about s3://bucket/team/labels description.toml
    """
    said, dataset = load_toml(Description, description), open_dataset(url)
    write_about(dataset.store, said, software=None)
    click.echo(f"{dataset.store.url}: described as {said.title or 'untitled'}")


@click.command("deprecate")
@click.argument("url")
@click.option("--reason", required=True, help="One line, shown to whoever opens the dataset.")
@click.option("--use", help="URL or name of the dataset to use instead.")
def deprecate_command(url: str, reason: str, use: str | None) -> None:
    """Tell everybody who trains with, describes or verifies the dataset at URL that it should not be used any more.

    Its labels stay readable. Given again, the notice is replaced; delete URL/deprecated.json to withdraw it.

    \b
    Example:
      softlabels deprecate s3://bucket/team/labels-1 --reason "wrong lexicon" --use s3://bucket/team#english:2
    """
    deprecation = parse(Deprecation, {"reason": reason, "use": use}, where="the notice")
    store = ObjectStore(located(url)[0])
    if use is not None:
        _check_use(store, use)
    deprecate(store, deprecation)
    click.echo(f"{store.url} is {deprecation.sentence()}")


def _check_use(store: ObjectStore, use: str) -> None:
    """Raises InputError where it is the dataset itself. One that cannot be opened here may be open to others; one on another
    storage is not looked for."""
    if urlsplit(use)[:2] != urlsplit(store.url)[:2]:
        return
    try:
        found = open_dataset(use).store.url
    except (InputError, IntegrityError, OSError) as error:
        click.echo(f"warning: --use {use} cannot be opened here: {error}", err=True)
        return
    if found == store.url:
        raise InputError(f"--use {use} leads to {store.url} itself; give the dataset to use in its place")


def _line(prefix: str, record: NameRecord, url: str) -> str:
    return f"{prefix}#{record.name}:{record.version} is {url}, content digest {record.content_digest}"
