"""Every path of a dataset, named once. Paths are relative to the dataset's URL and use "/"."""

from __future__ import annotations

import re

SPEC = "spec.json"
INVENTORY = "inventory.json"
MANIFEST = "manifest.json"
COMMITS = "commits"
SHARDS = "shards"

_COMMIT = re.compile(r"^commits/(\d{6})\.json$")


def commit_record(shard_index: int) -> str:
    return f"{COMMITS}/{shard_index:06d}.json"


def shard_index_of(commit_path: str) -> int | None:
    """The shard a path is the commit record of; None for any other path."""
    match = _COMMIT.match(commit_path)
    return int(match.group(1)) if match else None


def shard_folder(shard_index: int, shard_digest: str) -> str:
    """Where a shard's files lie. Named by their content: see FORMAT.md, "Why shards are named by content"."""
    return f"{SHARDS}/{shard_index:06d}-{shard_digest[:32]}"
