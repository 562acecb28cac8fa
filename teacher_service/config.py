"""JOB.toml -> frozen models. Paths are relative to the file's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from softlabel_schemas.selection import Selection
from softlabel_schemas.spec import CodecName, ShardFormat, check_temperatures
from softlabel_schemas.strict import StrictModel, load_toml

_SECRET_WORDS = ("secret", "password", "token", "credential", "access_key", "account_key", "sas", "connection_string")


class CorpusConfig(StrictModel):
    """``splits`` None labels the whole corpus."""

    manifest: str
    splits: Annotated[tuple[str, ...], Field(min_length=1)] | None = None


class TeacherConfig(StrictModel):
    """``weight`` is relative to the other teachers'. A bundle whose model is made by a factory outside this project runs
    that function's code: it must be named here too, ``allow_factory = "package.module:function"``."""

    bundle: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    allow_factory: str | None = None


class CombinationConfig(StrictModel):
    """ "arithmetic": mean of posteriors; "log_linear": mean of log-posteriors, renormalised."""

    method: Literal["arithmetic", "log_linear"] = "arithmetic"


class TargetConfig(StrictModel):
    """``temperatures``: tail masses are stored for each, so that students can use them; starts with 1.0."""

    temperatures: tuple[float, ...] = (1.0,)
    codec: CodecName = "packed-u8"

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_temperatures(self.temperatures)
        return self


class DestinationConfig(StrictModel):
    """``storage_options`` are passed to fsspec; credentials belong into its environment and are refused here."""

    url: str
    format: ShardFormat = "parquet"
    shard_seconds: Annotated[float, Field(gt=0)] = 7200.0
    storage_options: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        pending: list[tuple[str, JsonValue]] = list(self.storage_options.items())
        while pending:
            name, value = pending.pop()
            if name.lower() in ("key", "username") or any(word in name.lower() for word in _SECRET_WORDS):
                raise ValueError(
                    f"storage_options.{name} looks like a credential; leave it out of job files and set it in the "
                    "environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role)"
                )
            if isinstance(value, dict):
                pending.extend(value.items())
        return self


class ResourceConfig(StrictModel):
    """What each actor gets, and how it batches.

    Attributes:
        num_actors: each holds the whole ensemble.
        cpus_per_actor: also the number of torch threads.
        gpus_per_actor: may be a fraction; above 0 the teachers run on the GPU.
        batch_seconds: padded speech in a batch.
    """

    num_actors: Annotated[int, Field(ge=1)] = 1
    cpus_per_actor: Annotated[int, Field(ge=1)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    batch_seconds: Annotated[float, Field(gt=0)] = 120.0
    precision: Literal["float32", "bfloat16"] = "float32"


class ErrorConfig(StrictModel):
    """An utterance that cannot be labelled ends the job ("fail"), or is recorded and left out ("skip"), up to a share."""

    on_error: Literal["fail", "skip"] = "fail"
    max_skipped_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01


class JobConfig(StrictModel):
    """A whole job."""

    corpus: CorpusConfig
    teachers: Annotated[tuple[TeacherConfig, ...], Field(min_length=1)]
    combination: CombinationConfig = CombinationConfig()
    targets: TargetConfig = TargetConfig()
    selection: Selection
    destination: DestinationConfig
    resources: ResourceConfig = ResourceConfig()
    errors: ErrorConfig = ErrorConfig()


def load_job(path: str | Path) -> JobConfig:
    """Read a JOB.toml and resolve its relative paths. Raises InputError."""
    job = load_toml(JobConfig, path)
    folder = Path(path).resolve().parent

    def resolve(location: str) -> str:
        return location if "://" in location else str(folder / location)

    return job.model_copy(
        update={
            "corpus": job.corpus.model_copy(update={"manifest": resolve(job.corpus.manifest)}),
            "teachers": tuple(
                teacher.model_copy(update={"bundle": resolve(teacher.bundle)}) for teacher in job.teachers
            ),
            "destination": job.destination.model_copy(update={"url": resolve(job.destination.url)}),
        }
    )
