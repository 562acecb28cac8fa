"""Every path of a dataset, named once. Paths are relative to the dataset's URL and use "/"."""

from __future__ import annotations

import re

SPEC = "spec.json"
INVENTORY = "inventory.json"
MANIFEST = "manifest.json"
COMMITS = "commits"
SHARDS = "shards"
INDEX = "index"
# Beside the labels, and no part of them: see about.py and deprecation.py.
ABOUT = "about.json"
DEPRECATED = "deprecated.json"

_COMMIT = re.compile(r"^commits/([0-9]{6})\.json$")
# Of both containers: shard.parquet; zarr.json, <array>/zarr.json, <array>/c/<chunk>.
_SHARD_FILE = re.compile(
    r"^(shards/([0-9]{6})-[0-9a-f]{32})/(shard\.parquet|zarr\.json|[a-z_]+/zarr\.json|[a-z_]+/c/[0-9]+)$"
)
_BUCKET = re.compile(r"^index/[0-9]{6}-[0-9a-f]{32}$")


def commit_record(shard_index: int) -> str:
    return f"{COMMITS}/{shard_index:06d}.json"


def shard_index_of(commit_path: str) -> int | None:
    """The shard a path is the commit record of; None for any other path."""
    match = _COMMIT.match(commit_path)
    return int(match.group(1)) if match else None


def shard_folder(shard_index: int, shard_digest: str) -> str:
    """Where a shard's files lie. Named by their content: see FORMAT.md, "Why shards are named by content"."""
    return f"{SHARDS}/{shard_index:06d}-{shard_digest[:32]}"


def shard_folder_of(path: str) -> tuple[int, str] | None:
    """Shard index and folder of the file of a shard that a path may name; None for any other path."""
    match = _SHARD_FILE.match(path)
    return (int(match.group(2)), match.group(1)) if match else None


def index_bucket(bucket: int, sha256: str) -> str:
    """A bucket of the utterance index, named by its content as shards are."""
    return f"{INDEX}/{bucket:06d}-{sha256[:32]}"


def is_index_bucket(path: str) -> bool:
    return _BUCKET.match(path) is not None


def is_ours(path: str) -> bool:
    """Whether a dataset can hold a file of this name."""
    is_document = path in (SPEC, INVENTORY, MANIFEST, ABOUT, DEPRECATED) or shard_index_of(path) is not None
    return is_document or shard_folder_of(path) is not None or is_index_bucket(path)
