"""A static catalogue: ``index.html`` and a page for each dataset, without scripts and without requests.

The text of names and descriptions is other people's: the templates escape all of it. Needs jinja2 and matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from softlabel_schemas.card import sections
from softlabel_schemas.catalog import Catalog, Entry
from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.describe import selection_words
from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.html import page_templates
from softlabel_schemas.quality_plots import Plot, quality_plots
from softlabel_schemas.strict import printable
from softlabel_schemas.version import SOFTWARE

_INDEX = "index.html"


def catalog_pages(catalog: Catalog) -> Iterator[tuple[str, str]]:
    """File names and their HTML: a page for each published dataset, and ``index.html`` last, when what it links to is there."""
    templates = page_templates("softlabel_schemas")
    common = {"software": SOFTWARE, "index": _INDEX}
    pages = {entry.path: _page_name(entry) for entry in catalog.entries if entry.state == "published"}
    for entry in catalog.entries:
        if entry.state == "published":
            plots, problem = _plots(entry)
            template = templates.get_template("dataset.html.jinja")
            yield (
                pages[entry.path],
                template.render(
                    **common, entry=entry, catalog=catalog, sections=sections(entry), plots=plots, problem=problem
                ),
            )
    yield (
        _INDEX,
        templates.get_template("catalog.html.jinja").render(
            **common, catalog=catalog, pages=pages, selection_words=selection_words
        ),
    )


def _plots(entry: Entry) -> tuple[list[Plot], str]:
    try:
        # With the "/" it is no name, whatever the folder is called.
        return quality_plots(open_dataset(f"{entry.url}/" if "://" in entry.url else entry.url)), ""
    except (IntegrityError, OSError) as error:
        return [], printable(str(error), 300)


def _page_name(entry: Entry) -> str:
    """Readable, and of its own for each path, whatever that holds."""
    words = re.sub(r"[^a-z0-9]+", "-", entry.path.lower()).strip("-")[:60]
    return f"{words or 'dataset'}-{sha256_hex(entry.path.encode(errors='surrogateescape'))[:8]}.html"
