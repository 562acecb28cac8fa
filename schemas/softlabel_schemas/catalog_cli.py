"""The commands of ``softlabels`` that say what there is: cards and catalogues."""

from __future__ import annotations

import json

import click

from softlabel_schemas.card import card_markdown
from softlabel_schemas.catalog import entry_json, entry_lines, read_catalog, read_entry
from softlabel_schemas.command_line import progress
from softlabel_schemas.corpus import split_url
from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.object_store import ObjectStore


def _utf_8(text: str) -> bytes:
    """A folder's name, on a disk, can be other bytes than UTF-8."""
    return text.encode(errors="backslashreplace")


@click.command("card")
@click.argument("url")
# No file by default: a README.md that is there already would be somebody's own.
@click.option("--output", default="-", show_default=True, help="File to write, or its URL; - prints it.")
def card_command(url: str, output: str) -> None:
    """Write the card of the dataset at URL: Markdown with the metadata that Hugging Face's hub reads.

    \b
    Example:
      softlabels card s3://bucket/labels --output README.md
    """
    dataset = open_dataset(url)
    entry = read_entry(dataset.store, "")
    data = _utf_8(card_markdown(entry, dataset.manifest.shards))
    if entry.problem:
        click.echo(f"warning: the description of the dataset is left out: {entry.problem}", err=True)
    if output == "-":
        click.echo(data, nl=False)
        return
    folder, name = split_url(output)
    ObjectStore(folder).put(name, data)
    click.echo(f"wrote {output}")


@click.command("catalog")
@click.argument("url")
@click.option(
    "--html", "folder", help="Write a static catalogue into this folder or URL: index.html, a page for each dataset."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def catalog_command(url: str, folder: str | None, as_json: bool) -> None:
    """Say which datasets there are under URL, the half-made and damaged ones too.

    \b
    Examples:
      softlabels catalog s3://bucket/team
      softlabels catalog s3://bucket/team --html catalogue
    """
    catalog = read_catalog(url)
    if as_json:
        entries = [entry_json(entry) for entry in catalog.entries]
        click.echo(json.dumps({"url": catalog.url, "datasets": entries, "problems": catalog.problems}, indent=2))
    elif folder is None:
        lines = [line for entry in catalog.entries for line in entry_lines(entry)]
        lines += [f"could not be read: {problem}" for problem in catalog.problems]
        click.echo("\n".join([*lines, f"{url}: {len(catalog.entries)} datasets"]))
    if folder is not None:
        # Here, since it needs more than what the core installs.
        from softlabel_schemas.catalog_page import catalog_pages

        pages, store = 0, ObjectStore(folder)
        with progress("catalog", len(catalog.entries) + 1, "pages") as advance:
            for name, page in catalog_pages(catalog):
                store.put(name, _utf_8(page))
                pages += 1
                advance(pages)
        click.echo(f"wrote {pages} pages to {folder}", err=as_json)
