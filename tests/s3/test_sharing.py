"""Names, notices, catalogues and subsets on a real S3 server."""

from __future__ import annotations

import json
from collections.abc import Callable

from click.testing import CliRunner, Result

from softlabel_schemas import open_dataset
from softlabel_schemas.cli import main
from softlabel_schemas.object_store import ObjectStore
from tests.support.datasets import random_rows, write_dataset


def softlabels(*args: str) -> Result:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.stderr
    return result


def test_a_prefix_is_shared(new_url: Callable[[str], str]) -> None:
    base = new_url("s3")
    first = write_dataset(f"{base}/labels-1", shard_format="parquet", rows=random_rows(1))
    second = write_dataset(f"{base}/deep/labels#2", shard_format="zarr", rows=random_rows(2))
    for written in (first, second, second):
        # The "/" says that it is no name.
        softlabels("tag", f"{written.url}/", f"{base}#english")
    assert open_dataset(f"{base}#english:1").manifest == first.manifest
    assert open_dataset(f"{base}#english").manifest == second.manifest
    taken = CliRunner().invoke(main, ["tag", f"{second.url}/", f"{base}#english:1"])
    assert (taken.exit_code, "never changes hands" in taken.stderr) == (2, True)

    softlabels("deprecate", first.url, "--reason", "old", "--use", f"{base}#english:2")
    assert "is deprecated: old" in softlabels("verify", f"{base}#english:1").stderr
    found = json.loads(softlabels("catalog", base, "--json").stdout)["datasets"]
    assert [(entry["path"], entry["names"], entry["deprecated"] is not None) for entry in found] == [
        ("deep/labels#2", ["english:2"], False),
        ("labels-1", ["english:1"], True),
    ]
    assert ObjectStore(base).children("") == (["deep", "labels-1", "names"], [])

    softlabels("pull", f"{base}#english:2", f"{base}/some", "--shards", "0-1")
    some = open_dataset(f"{base}/some")
    assert some.manifest.spec.subset_of is not None
    assert some.manifest.spec.subset_of.content_digest == second.manifest.content_digest
    labels = json.loads(softlabels("diff", f"{base}/some", f"{base}#english:2", "--json").stdout)["labels"]
    assert labels["identical_utterances"] == labels["utterances"] == len(some)
    softlabels("card", f"{base}/some", "--output", f"{base}/some/README.md")
    assert b"Subset of" in ObjectStore(f"{base}/some").read("README.md")
