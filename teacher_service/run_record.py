"""What a job was planned to take, and what its runs took, kept at the destination for ``status``.

``plan.json`` is put there by ``teacher-service plan --save``. Where it is, each run of the job leaves a record of itself under
``runs/`` when it ends, stopped or not. Both are sealed documents beside the dataset, not part of it (FORMAT.md: other files are
ignored).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from pydantic import Field

from softlabel_schemas import layout
from softlabel_schemas.commit import read_manifest, read_spec
from softlabel_schemas.errors import InputError
from softlabel_schemas.manifest import from_bytes, to_bytes
from softlabel_schemas.object_store import MAX_DOCUMENT_BYTES, ObjectStore
from softlabel_schemas.spec import Count, Sha256
from softlabel_schemas.strict import StrictModel
from teacher_service.job_plan import Plan

_PLAN, _RUNS = "plan.json", "runs"

Seconds = Annotated[float, Field(ge=0)]


class RunRecord(StrictModel):
    """One run of a job, from its first actor to its end.

    Attributes:
        started: UTC, ISO 8601.
        wall_seconds: from the first actor that had room.
        actor_seconds: of all actors, from room to end.
    """

    fingerprint: Sha256
    started: str
    wall_seconds: Seconds
    actor_seconds: Seconds
    num_shards: Count
    num_retries: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Actual:
    """What a published dataset came to; times are None where not every shard was made by a run that left a record."""

    num_shards: int
    num_frames: int
    num_bytes: int
    num_puts: int
    wall_hours: float | None
    actor_hours: float | None

    def lines(self, plan: Plan) -> Iterator[str]:
        """Beside what was planned."""
        yield f"{'':12}{'planned':>14} {'actual':>14}"
        for name, planned, actual, form in (
            ("shards", plan.num_shards, self.num_shards, ",.0f"),
            ("frames", plan.num_frames.expected, self.num_frames, ",.0f"),
            ("bytes", plan.num_bytes.expected, self.num_bytes, ",.0f"),
            ("objects", plan.num_puts, self.num_puts, ",.0f"),
            ("hours", plan.wall_hours.expected, self.wall_hours, ",.4f"),
            ("actor-hours", plan.actor_hours.expected, self.actor_hours, ",.4f"),
        ):
            if actual is None:
                yield f"{name:12}{planned:>14{form}} {'not recorded':>14}"
            else:
                yield f"{name:12}{planned:>14{form}} {actual:>14{form}} {actual / planned - 1:+z8.1%}"


def save_plan(store: ObjectStore, plan: Plan) -> None:
    """In place of an earlier one. Raises InputError where another run was begun there."""
    try:
        fingerprint = read_spec(store).spec.fingerprint()
    except InputError:
        fingerprint = plan.fingerprint
    if fingerprint != plan.fingerprint:
        raise InputError(
            f"{store.url} was begun with other settings (fingerprint {fingerprint[:12]}, the plan is of "
            f"{plan.fingerprint[:12]}); use them or another destination"
        )
    store.put(_PLAN, to_bytes(plan))


def read_plan(store: ObjectStore, fingerprint: str) -> Plan | None:
    """The plan of this job; None where none was saved or it is of other settings. Raises IntegrityError."""
    data = store.read_if_there(_PLAN, max_bytes=MAX_DOCUMENT_BYTES)
    if data is None:
        return None
    plan = from_bytes(Plan, data, where=store.describe(_PLAN))
    return plan if plan.fingerprint == fingerprint else None


def save_run(store: ObjectStore, record: RunRecord) -> None:
    """Where the job was planned; a dataset that was not stays free of what depends on the clock."""
    if read_plan(store, record.fingerprint) is not None:
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
        store.put(f"{_RUNS}/{name}.json", to_bytes(record))


def read_actual(store: ObjectStore) -> Actual:
    """Raises FileNotFoundError where nothing is published, IntegrityError where a document is damaged."""
    manifest = read_manifest(store)
    objects = store.list("")
    keys = [key for key in objects if key.startswith(f"{_RUNS}/")]
    records = [
        from_bytes(RunRecord, data, where=store.describe(key))
        for key, data in zip(keys, store.read_many(keys), strict=True)
    ]
    runs = [record for record in records if record.fingerprint == manifest.fingerprint]
    dataset = [stored for key, stored in objects.items() if layout.is_ours(key)]
    num_shards = len(manifest.shards)
    timed = sum(run.num_shards for run in runs) >= num_shards
    return Actual(
        num_shards=num_shards,
        num_frames=sum(shard.num_frames for shard in manifest.shards),
        num_bytes=sum(stored.num_bytes for stored in dataset),
        num_puts=len(dataset),
        wall_hours=sum(run.wall_seconds for run in runs) / 3600 if timed else None,
        actor_hours=sum(run.actor_seconds for run in runs) / 3600 if timed else None,
    )
