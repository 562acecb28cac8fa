"""JOB.toml -> frozen models. Paths are relative to the file's folder."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, JsonValue, model_validator

from softlabel_schemas.about import Description
from softlabel_schemas.errors import InputError
from softlabel_schemas.folds import NumFolds
from softlabel_schemas.object_store import refuse_credentials
from softlabel_schemas.selection import Selection, check_sampled_temperatures
from softlabel_schemas.spec import CodecName, ShardFormat, check_folds, check_temperatures
from softlabel_schemas.strict import StrictModel, load_toml

# How a word of a name ends, so that PGPASSWORD is one and TOKENIZERS_PARALLELISM none.
_SECRET_ENDS = (
    *("secret", "secrets", "password", "passwd", "passphrase", "token", "credential", "credentials", "apikey", "pkey"),
    *("authorization", "sshpass"),
)
# The last word of a name, so that DB_PASS, MYSQL_PWD and HMAC_KEY are some and BYPASS, KEYBOARD and KEY_PREFIX none.
_SECRET_LAST = {"key", "pass", "pwd", "pat"}
_SECRET_PAIRS = {
    *(("api", "key"), ("access", "key"), ("private", "key"), ("account", "key"), ("key", "content")),
    *(("connection", "string"), ("pass", "phrase"), ("auth", "config")),
    *(("basic", "auth"), ("http", "auth"), ("proxy", "auth"), ("redis", "auth")),
}
_PRIVATE_KEY = "PRIVATE KEY-----"
_WORD_ENDS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")


def refuse_credentials_in(text: str) -> str:
    """``text`` itself. Raises InputError where a URL anywhere in it holds a credential; the text is not shown."""
    _, *parts = _SCHEME.split(text)
    for scheme, rest in zip(parts[::2], parts[1::2], strict=True):
        url = f"{scheme}://{rest.split(maxsplit=1)[0] if rest.strip() else ''}"
        try:
            host = urlsplit(url).netloc
        except ValueError:
            raise InputError(f"the {scheme}:// URL cannot be read; check its host") from None
        refuse_credentials(url)
        # Elsewhere it is a user's or a container's name; with HTTP it may be a token.
        if scheme.lower().rpartition("+")[2] in ("http", "https") and "@" in host:
            raise InputError(
                f"the {scheme}:// URL holds a user name; leave it out, and give the machines what they need to sign in"
            )
    return text


def check_no_secrets(options: Mapping[str, JsonValue], *, where: str = "") -> None:
    """Raises ValueError for a name that looks like a credential's, or a URL that holds one, at any depth; no value is shown."""
    pending: list[tuple[str, str, JsonValue]] = [(where, name, value) for name, value in options.items()]
    while pending:
        table, name, value = pending.pop()
        path = f"{table}.{name}" if table else name
        # Whether there is one, as of verify_token, is none.
        if _looks_secret(name) and not isinstance(value, bool | None):
            raise ValueError(
                f"{path} looks like a credential; leave it out of job files and set it in the environment of "
                "the machines (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role)"
            )
        if isinstance(value, dict):
            pending.extend((path, key, item) for key, item in value.items())
        elif isinstance(value, list):
            pending.extend((table, name, item) for item in value)
        elif isinstance(value, str):
            if _PRIVATE_KEY in value:
                raise ValueError(
                    f"{path} is a private key; leave it out, and set it in the environment of the machines"
                )
            try:
                refuse_credentials_in(value)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None


def _looks_secret(name: str) -> bool:
    words = [word.lower() for word in _WORD_ENDS.split(name) if word]
    return (
        words in (["auth"], ["username"])
        # PWD alone is the working folder.
        or (words != ["pwd"] and not _SECRET_LAST.isdisjoint(words[-1:]))
        or any(word == "sas" or word.endswith(_SECRET_ENDS) for word in words)
        or not _SECRET_PAIRS.isdisjoint(itertools.pairwise(words))
    )


# A path or a URL, which messages and a cluster's job list show.
Location = Annotated[str, AfterValidator(refuse_credentials_in)]


class CorpusConfig(StrictModel):
    """Attributes:
    splits: None labels the whole corpus.
    num_folds: label each utterance only by the teachers of its speaker's fold, see ``softlabel_schemas.folds``; None: by all.
    """

    manifest: Location
    splits: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    num_folds: NumFolds | None = None


class TeacherConfig(StrictModel):
    """``weight`` is relative to the other teachers' (of the fold). ``fold``: it labels only the speakers of this fold of
    ``corpus.num_folds``, and the bundle says that it was trained without them. A bundle whose model is made by a
    factory outside this project runs that function's code: it must be named here too, ``allow_factory =
    "package.module:function"``."""

    bundle: Location
    weight: Annotated[float, Field(gt=0)] = 1.0
    fold: Annotated[int, Field(ge=0)] | None = None
    allow_factory: str | None = None


class CombinationConfig(StrictModel):
    """ "arithmetic": mean of posteriors; "log_linear": mean of log-posteriors, renormalised."""

    method: Literal["arithmetic", "log_linear"] = "arithmetic"


class TargetConfig(StrictModel):
    """``temperatures``: tail masses are stored for each, so that students can use them; starts with 1.0."""

    temperatures: tuple[float, ...] = (1.0,)
    codec: CodecName = "mtf-sqrt"

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_temperatures(self.temperatures)
        return self


class DestinationConfig(StrictModel):
    """Where the dataset goes.

    Attributes:
        storage_options: passed to fsspec; credentials belong into its environment and are refused here.
        accept_last_writer_wins: write to a store that cannot create conditionally; safe only while one job writes there.
    """

    url: Location
    format: ShardFormat = "parquet"
    shard_seconds: Annotated[float, Field(gt=0)] = 7200.0
    storage_options: dict[str, JsonValue] = Field(default_factory=dict)
    accept_last_writer_wins: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_no_secrets(self.storage_options, where="storage_options")
        return self


class ResourceConfig(StrictModel):
    """What each actor gets, and how it batches.

    Attributes:
        num_actors: each holds the whole ensemble, with folds those of all folds; a batch is run by those of one.
        cpus_per_actor: also the number of torch threads.
        gpus_per_actor: may be a fraction; above 0 the teachers run on the GPU. All of them on one: more GPUs are more actors.
        batch_seconds: padded speech in a batch.
    """

    num_actors: Annotated[int, Field(ge=1)] = 1
    cpus_per_actor: Annotated[int, Field(ge=1)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0, le=1)] = 0.0
    batch_seconds: Annotated[float, Field(gt=0)] = 120.0
    precision: Literal["float32", "bfloat16"] = "float32"


class ErrorConfig(StrictModel):
    """What becomes of what cannot be done.

    Attributes:
        on_error: an utterance that cannot be labelled ends the job ("fail"), or is recorded and left out ("skip").
        max_skipped_fraction: of all utterances; more end the job.
        stall_minutes: an actor that finishes no batch and stores nothing for so long is taken for stuck and replaced.
        room_minutes: a job ends when no actor has had room on the cluster for so long; spot machines may not be had for hours.
    """

    on_error: Literal["fail", "skip"] = "fail"
    max_skipped_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    stall_minutes: Annotated[float, Field(gt=0)] = 15.0
    room_minutes: Annotated[float, Field(gt=0)] = 30.0


def _check_teachers(teachers: tuple[TeacherConfig, ...]) -> tuple[TeacherConfig, ...]:
    """Pydantic's own check runs although a teacher is refused, and shows the teachers: a credential may be in them."""
    if not teachers:
        raise ValueError("at least one teacher is needed, found none")
    weights = [teacher.weight for teacher in teachers]
    if not math.isfinite(sum(weights)) or min(weights) / sum(weights) == 0:
        raise ValueError(f"the weights run from {min(weights):g} to {max(weights):g}, of which no shares can be made")
    return teachers


class JobConfig(StrictModel):
    """A whole job. ``description`` decides nothing of the labels, and may change between runs (see ``about.py``)."""

    corpus: CorpusConfig
    teachers: Annotated[tuple[TeacherConfig, ...], AfterValidator(_check_teachers)]
    combination: CombinationConfig = CombinationConfig()
    targets: TargetConfig = TargetConfig()
    selection: Selection
    destination: DestinationConfig
    resources: ResourceConfig = ResourceConfig()
    errors: ErrorConfig = ErrorConfig()
    description: Description = Description()

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_folds([teacher.fold for teacher in self.teachers], self.corpus.num_folds)
        check_sampled_temperatures(self.selection, self.targets.temperatures)
        return self


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
