"""A job from its beginning to its publication in this process: one actor, without Ray."""

from __future__ import annotations

from teacher_service.job import PreparedJob, missing_shards, publish_job
from teacher_service.labelling_actor import LabellingActor


def run_here(job: PreparedJob) -> None:
    missing, actor = missing_shards(job), LabellingActor(job)
    if missing:
        actor.load()
    for shard_range in missing:
        actor.label(shard_range)
    publish_job(job)
