"""The policies against AWS' own list of actions and condition keys, and against the names that a dataset's objects have."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
from policy_sentry.querying.actions import get_action_data

from softlabel_schemas import layout
from softlabel_schemas.names import NameRecord
from teacher_service.config import load_job

FOLDER = Path(__file__).parents[3] / "deploy" / "iam"
POLICIES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
ROLES = ("reader", "writer", "publisher")
BUCKET = "arn:aws:s3:::essence-labels"
OVERLAYS = sorted((FOLDER.parent / "kuberay" / "overlays").glob("*/job.toml"))
# Where the jobs that come with the policies write.
(DATASET,) = {f"arn:aws:s3:::{load_job(path).destination.url.removeprefix('s3://')}" for path in OVERLAYS}

SHARD = layout.shard_folder(3, "a" * 64) + "/shard.parquet"
COMMIT = layout.commit_record(3)
ONCE = (layout.SPEC, layout.INVENTORY, layout.MANIFEST)
INDEX = layout.index_bucket(0, "b" * 64)


def statements(policy: str) -> list[dict[str, Any]]:
    return list(POLICIES[policy]["Statement"])


def allowed(role: str, action: str, resource: str, **context: str) -> bool:
    """As IAM decides, of the operators used here: a Deny of the bucket wins, then an Allow of the role is needed."""
    found = [each for each in (*statements(role), *statements("bucket")) if _applies(each, action, resource, context)]
    return bool(found) and all(each["Effect"] == "Allow" for each in found)


def _applies(statement: dict[str, Any], action: str, resource: str, context: dict[str, str]) -> bool:
    conditions = statement.get("Condition", {})
    assert set(conditions) <= {"Null", "StringLikeIfExists", "Bool"}
    context = {"aws:SecureTransport": "true"} | {
        f"s3:{name.replace('_', '-')}": value for name, value in context.items()
    }
    return (
        any(fnmatch.fnmatchcase(action, pattern) for pattern in statement["Action"])
        and any(fnmatch.fnmatchcase(resource, pattern) for pattern in statement["Resource"])
        and all((key in context) == (value == "false") for key, value in conditions.get("Null", {}).items())
        and all(context.get(key) == value for key, value in conditions.get("Bool", {}).items())
        and all(
            key not in context or any(fnmatch.fnmatchcase(context[key], pattern) for pattern in patterns)
            for key, patterns in conditions.get("StringLikeIfExists", {}).items()
        )
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_the_grammar_is_iams(policy: str) -> None:
    document = POLICIES[policy]
    assert set(document) == {"Version", "Statement"}
    assert document["Version"] == "2012-10-17"
    sids = [statement["Sid"] for statement in document["Statement"]]
    assert len(set(sids)) == len(sids)
    for statement in document["Statement"]:
        principal = {"Principal"} if policy == "bucket" else set()
        assert {"Sid", "Effect", "Action", "Resource"} | principal <= set(statement)
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"} | principal
        # No wildcard gives anything.
        assert statement["Effect"] == ("Deny" if policy == "bucket" else "Allow")
        assert all(action != "s3:*" for action in statement["Action"]) or statement["Effect"] == "Deny"


@pytest.mark.parametrize("policy", POLICIES)
def test_actions_and_conditions_exist_and_fit_their_resources(policy: str) -> None:
    for statement in statements(policy):
        for action in statement["Action"]:
            if action == "s3:*":
                continue
            known = get_action_data("s3", action.removeprefix("s3:"))
            assert known, action
            variants = known["s3"]
            keys = {key for variant in variants for key in variant["condition_keys"]}
            used = {key for operator in statement.get("Condition", {}).values() for key in operator}
            assert used <= keys | {"s3:prefix", "aws:SecureTransport"}, action
            of_objects = action != "s3:ListBucket"
            assert all(("/" in resource) == of_objects for resource in statement["Resource"]), action


def test_a_reader_reads_its_teams_datasets_and_no_others() -> None:
    for key in (*ONCE, COMMIT, SHARD, INDEX):
        assert allowed("reader", "s3:GetObject", f"{DATASET}/{key}")
        assert not allowed("reader", "s3:PutObject", f"{DATASET}/{key}", if_none_match="*")
        assert not allowed("reader", "s3:GetObject", f"{BUCKET}/other/speech-train/{key}")
    assert allowed("reader", "s3:ListBucket", BUCKET, prefix="team/speech-train/commits")
    assert not allowed("reader", "s3:ListBucket", BUCKET, prefix="other/")
    # Looked for by its name, an object that is missing is "not found" only to those who may list; no prefix is asked for.
    assert allowed("reader", "s3:ListBucket", BUCKET)


def test_a_writer_stores_shards_and_commits_each_once() -> None:
    assert allowed("writer", "s3:PutObject", f"{DATASET}/{SHARD}")
    assert allowed("writer", "s3:PutObject", f"{DATASET}/{COMMIT}", if_none_match="*")
    assert not allowed("writer", "s3:PutObject", f"{DATASET}/{COMMIT}")
    for key in (*ONCE, INDEX):
        assert not allowed("writer", "s3:PutObject", f"{DATASET}/{key}", if_none_match="*")


def test_a_publisher_begins_and_publishes_once_but_makes_no_labels() -> None:
    for key in ONCE:
        assert allowed("publisher", "s3:PutObject", f"{DATASET}/{key}", if_none_match="*")
        assert not allowed("publisher", "s3:PutObject", f"{DATASET}/{key}")
    for key in (INDEX, layout.ABOUT, layout.DEPRECATED, "plan.json", "runs/20260101T000000Z-0123abcd.json"):
        assert allowed("publisher", "s3:PutObject", f"{DATASET}/{key}")
        assert not allowed("writer", "s3:PutObject", f"{DATASET}/{key}", if_none_match="*")
    for key in (COMMIT, SHARD):
        assert not allowed("publisher", "s3:PutObject", f"{DATASET}/{key}", if_none_match="*")


def test_a_version_of_a_name_is_given_once_and_by_publishers_alone() -> None:
    record = NameRecord(name="english", version=3, path="speech-train", content_digest="0" * 64)
    assert allowed("publisher", "s3:PutObject", f"{BUCKET}/team/{record.key}", if_none_match="*")
    assert not allowed("publisher", "s3:PutObject", f"{BUCKET}/team/{record.key}")
    assert not allowed("writer", "s3:PutObject", f"{BUCKET}/team/{record.key}", if_none_match="*")
    assert allowed("reader", "s3:GetObject", f"{BUCKET}/team/{record.key}")


@pytest.mark.parametrize("role", ROLES)
def test_nobody_deletes_or_speaks_in_clear(role: str) -> None:
    assert not allowed(role, "s3:DeleteObject", f"{DATASET}/{SHARD}")
    listing = next(each for each in statements(role) if "s3:ListBucket" in each["Action"])
    assert listing["Effect"] == "Allow"
    in_clear = {"aws:SecureTransport": "false"}
    assert any(_denied_in_clear(each, in_clear) for each in statements("bucket"))


def _denied_in_clear(statement: dict[str, Any], context: dict[str, str]) -> bool:
    return statement["Effect"] == "Deny" and statement.get("Condition", {}).get("Bool") == context
