"""Submit a job to a Ray cluster through its Jobs API, follow its log, and return how it ended.

The job file travels as the job's working directory, its paths made absolute: manifests and bundles lie on object storage or
on a disk that the cluster's nodes share. The nodes have this package installed, or a runtime environment installs it.
Credentials are never sent: Ray stores and shows a job's environment, so the nodes have their own (a role, or variables).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv

from softlabel_schemas.errors import InputError
from softlabel_schemas.strict import read_toml
from teacher_service.config import JobConfig, check_no_secrets, load_job

# Beside the files of a user's working directory.
_JOB_FILE = ".softlabels-job.toml"
# Whatever a .gitignore, a .rayignore or ``excludes`` says; the first line is for "*", which also means the folder itself.
_ALWAYS_SENT = ("!/.", f"!/{_JOB_FILE}")
_ENTRYPOINT = f"python -m teacher_service.cli run {_JOB_FILE}"
# Names a job on the cluster by where it writes to, so that ``stop`` finds it.
_DESTINATION = "softlabels.destination"
_ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_POLL_SECONDS = 1.0
_STOP_SECONDS = 60.0
# To connect, and to wait for the next bytes of an answer.
_TIMEOUT_SECONDS = (10.0, 60.0)
# A log that brings nothing for so long is asked for again: the connection may be dead without a word.
_SILENT_SECONDS = 30.0
# A restarted head is back by then.
_LOST_SECONDS = 120.0
_BROKEN = (OSError, RuntimeError, RayError, aiohttp.ClientError)
# Of a runtime environment: each may name a file, whose lines are sent.
_PACKAGES = ("pip", "uv", "conda")

ResultT = TypeVar("ResultT")


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client waits for a silent server for ever; this one does not."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_TIMEOUT_SECONDS, **options)


@dataclass(slots=True, kw_only=True)
class _Log:
    """Passes a job's log on, each character once, however often it is read from the beginning."""

    write: Callable[[str], None]
    num_written: int = 0

    def add(self, text: str, start: int) -> None:
        """``text`` stands at character ``start`` of the log."""
        self.write(text[max(0, self.num_written - start) :])
        self.num_written = max(self.num_written, start + len(text))


class Cluster:
    """The Jobs API of a Ray cluster. Raises InputError where none answers at ``address``."""

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            with _without_addresses():
                self._client = _Client(address)
        except (OSError, RuntimeError, RayError, ValueError, LookupError) as error:
            raise InputError(
                f"no Ray Jobs API answers at {address} ({error}); give the address of the cluster's dashboard, such as "
                "http://127.0.0.1:8265, and for a cluster with token authentication RAY_AUTH_MODE and RAY_AUTH_TOKEN"
            ) from None

    def submit(self, job: str | Path, runtime_env: str | Path | None = None) -> str:
        """The submission id. Raises InputError where the job file or the runtime environment cannot be used."""
        config = load_job(job)
        environment = load_runtime_env(runtime_env)
        with tempfile.TemporaryDirectory(prefix="teacher-service-") as folder:
            if "working_dir" in environment:
                _copy_working_dir(Path(environment["working_dir"]), Path(folder))
            (Path(folder) / _JOB_FILE).write_text(to_toml(config), encoding="utf-8")
            environment["working_dir"] = folder
            if "excludes" in environment:
                environment["excludes"] = [*environment["excludes"], *_ALWAYS_SENT]
            try:
                submission_id: str = self._client.submit_job(
                    entrypoint=_ENTRYPOINT, runtime_env=environment, metadata={_DESTINATION: config.destination.url}
                )
            except (RayError, RuntimeError, TypeError, ValueError) as error:
                raise InputError(f"the Ray cluster at {self.address} did not take the job: {error}") from None
        return submission_id

    def follow(self, submission_id: str, write: Callable[[str], None]) -> int:
        """Pass the log on until the job has ended; its exit code: that of ``teacher-service run``, or 130 if it was stopped.

        Raises:
            ConnectionError: the cluster has not answered for two minutes; the job may go on.
        """
        log = _Log(write=write)
        while True:
            asyncio.run(self._tail(submission_id, log))
            info = self._persistently(self._client.get_job_info, submission_id)
            if info.status.is_terminal():
                break
            time.sleep(_POLL_SECONDS)
        log.add(self._persistently(self._client.get_job_logs, submission_id), 0)
        if info.status == JobStatus.SUCCEEDED:
            return 0
        if info.status == JobStatus.STOPPED:
            return 130
        if not log.num_written:
            # It never ran: a runtime environment that could not be made, for instance.
            write(f"{info.message}\n")
        return info.driver_exit_code or 1

    async def _tail(self, submission_id: str, log: _Log) -> None:
        """Until the connection ends, breaks or brings nothing; each one starts at the beginning of the log."""
        chunks = self._client.tail_job_logs(submission_id)
        start = 0
        while True:
            try:
                text = await asyncio.wait_for(anext(chunks), _SILENT_SECONDS)
            except (StopAsyncIteration, *_BROKEN):
                # Whether the job has ended too is asked next; if not, what it has written since comes with the next one.
                return
            log.add(text, start)
            start += len(text)

    def stop(self, job: str | Path) -> list[str]:
        """Stop the submitted jobs that write to this job's destination; their submission ids. What they committed stays.

        Raises:
            InputError: the cluster refused.
            OSError: it did not answer, or a job has not ended in a minute.
        """
        destination = load_job(job).destination.url
        try:
            stopped = [
                details.submission_id
                for details in self._client.list_jobs()
                if (details.metadata or {}).get(_DESTINATION) == destination and not details.status.is_terminal()
            ]
            for submission_id in stopped:
                self._client.stop_job(submission_id)
        except (RayError, RuntimeError) as error:
            raise InputError(f"the Ray cluster at {self.address} did not stop the job: {error}") from None
        deadline = time.monotonic() + _STOP_SECONDS
        for submission_id in stopped:
            while not self._persistently(self._client.get_job_info, submission_id).status.is_terminal():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{submission_id} has not ended {_STOP_SECONDS:g} s after it was told to stop")
                time.sleep(_POLL_SECONDS)
        return stopped

    def _persistently(self, request: Callable[[str], ResultT], submission_id: str) -> ResultT:
        started = time.monotonic()
        while True:
            try:
                return request(submission_id)
            except _BROKEN as error:
                seconds = time.monotonic() - started
                if seconds > _LOST_SECONDS:
                    raise ConnectionError(
                        f"lost sight of {submission_id}: {self.address} has not answered for {seconds:.0f} s ({error}); the "
                        "job may go on. See 'teacher-service status', and end it with 'teacher-service stop'"
                    ) from error
            time.sleep(_POLL_SECONDS)


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Ray lets these variables win over the address given."""
    kept = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def load_runtime_env(path: str | Path | None) -> dict[str, Any]:
    """A Ray runtime environment from a TOML file: ``pip``, ``env_vars``, ``working_dir``, ``py_modules`` and so on.

    Raises:
        InputError: it cannot be read, or holds what looks like a credential; so may the files of ``pip``, ``uv`` and ``conda``.
    """
    if path is None:
        return {}
    environment = read_toml(path)
    _refuse_secrets(environment, where=path)
    _refuse_secrets(_packages(environment, where=path), where=path)
    variables = environment.get("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise InputError(f'{path}: env_vars must be a table of strings, such as OMP_NUM_THREADS = "1"')
    excludes = environment.get("excludes", [])
    if not isinstance(excludes, list) or not all(isinstance(value, str) for value in excludes):
        raise InputError(f'{path}: excludes must be an array of strings, such as ["*.wav"]')
    folder = environment.get("working_dir")
    if folder is not None:
        resolved = Path(path).resolve().parent / str(folder)
        if "://" in str(folder) or not resolved.is_dir():
            raise InputError(
                f"{path}: working_dir must be a folder here, since the job file is added to it; found {folder}"
            )
        if (resolved / _JOB_FILE).exists():
            raise InputError(f"{path}: working_dir holds {_JOB_FILE}, the name of the job file that is added to it")
        environment["working_dir"] = str(resolved)
    return environment


def _refuse_secrets(environment: dict[str, Any], *, where: str | Path) -> None:
    try:
        check_no_secrets(environment)
    except ValueError as error:
        raise InputError(f"{where}: {error}; Ray would store and show it") from None


def _packages(environment: dict[str, Any], *, where: str | Path) -> dict[str, Any]:
    """As Ray would send them, with the lines of the files that they name. Raises InputError where it does not take them."""
    try:
        packages = RuntimeEnv(**{name: environment.get(name) for name in _PACKAGES}).to_dict()
        # YAML has keys and values that JSON has not.
        sent: dict[str, Any] = json.loads(json.dumps(packages))
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: Ray does not take these packages: {error}") from None
    return sent


def _copy_working_dir(source: Path, target: Path) -> None:
    """What it leaves out stays left out, secrets may be among it; but not the job file."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for name in (".gitignore", ".rayignore"):
        rules = target / name
        if rules.is_file():
            try:
                text = rules.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{source / name} is not UTF-8, as which Ray reads it: {error}") from None
            # The copy may be read-only.
            rules.unlink()
            rules.write_text("\n".join([text, *_ALWAYS_SENT, ""]), encoding="utf-8")


def to_toml(config: JobConfig) -> str:
    """A job file of this configuration, read back to be sure that it says the same."""
    fields = config.model_dump(mode="json", exclude_none=True)
    lines: list[str] = []
    for table, body in fields.items():
        for entries in body if isinstance(body, list) else [body]:
            lines.append(f"[[{table}]]" if isinstance(body, list) else f"[{table}]")
            lines += [f"{name} = {toml_value(value)}" for name, value in entries.items()]
    text = "\n".join(lines) + "\n"
    if tomllib.loads(text) != fields:
        raise InputError("this job cannot be written as TOML; submit its file with 'ray job submit'")
    return text


def toml_value(value: Any) -> str:
    """Strings, numbers, arrays and inline tables are written much as in JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # TOML has no surrogate pairs, and wants DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
