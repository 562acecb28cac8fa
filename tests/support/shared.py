"""A prefix as teams share it: datasets of all kinds and states, with names and descriptions."""

from __future__ import annotations

import shutil
from pathlib import Path

from softlabel_schemas.about import Description, write_about
from softlabel_schemas.deprecation import Deprecation, deprecate
from softlabel_schemas.names import tag, wanted_address
from softlabel_schemas.object_store import ObjectStore
from tests.support.datasets import random_rows, write_dataset

# What people type, and what they might want a page to do with it.
HOSTILE = '</title><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7 * 7 }} & "quoted"'
DESCRIPTION = Description(
    title="Read speech",
    owner="speech team",
    licence="CC-BY-4.0",
    corpus="a thousand hours of books",
    languages=("en", "pt-BR"),
    text="The first paragraph.\n\n# no heading\n1. no list\n- nor here | *not bold* <b>nor so</b>",
    restrictions="Not for telling speakers apart.",
)


def write_prefix(folder: Path) -> str:
    """Published: ``labels-1`` (Parquet, described, english:1), ``labels-2`` (Zarr, deprecated, english:2), ``deep/er/labels-3``
    (everything its maker says is hostile). ``begun`` is not finished, the manifest of ``broken`` is damaged."""
    first, second, third = (
        write_dataset(str(folder / path), shard_format=form, num_shards=2, rows=random_rows(seed)).url
        for seed, (path, form) in enumerate(
            [("labels-1", "parquet"), ("labels-2", "zarr"), ("deep/er/labels-3", "parquet")]
        )
    )
    write_about(ObjectStore(first), DESCRIPTION)
    hostile = dict.fromkeys(("title", "owner", "licence", "corpus", "text", "restrictions"), HOSTILE)
    write_about(ObjectStore(third), Description.model_validate(hostile))
    for url in (first, second):
        tag(url, wanted_address(f"{folder}#english"))
    deprecate(ObjectStore(second), Deprecation(reason=f"wrong lexicon {HOSTILE}", use=f"{folder}#english:1"))
    shutil.copytree(first, folder / "begun")
    (folder / "begun" / "manifest.json").unlink()
    (folder / "begun" / "commits" / "000001.json").unlink()
    shutil.copytree(first, folder / "broken")
    (folder / "broken" / "manifest.json").write_bytes(b"{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "README.txt").write_text("no dataset")
    return str(folder)
