"""Submitting without a cluster: Ray's own client against a small server on loopback, and a log whose stream breaks."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
import tomllib
import zipfile
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from ray.job_submission import JobStatus

from softlabel_schemas import InputError
from teacher_service import submit
from teacher_service.config import TeacherConfig, load_job
from teacher_service.submit import Cluster, load_runtime_env, to_toml, toml_value
from tests.support.teachers import job_fields, make_job, write_job

TEACHERS = [TeacherConfig(bundle="s3://bucket/teacher")]


class JobsApi:
    """As much of Ray's Jobs API as submitting takes.

    Attributes:
        status: of the answer to a submitted job; 0: it never comes.
        jobs: what was submitted.
        packages: uploaded zip files.
    """

    def __init__(self) -> None:
        self.status = 200
        self.jobs: list[dict[str, Any]] = []
        self.packages: list[bytes] = []
        self.ended = threading.Event()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *_: Any) -> None:
                """Silent."""

            def answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if self.path == "/api/version":
                    self.answer(200, {"ray_version": "2.60.0"})
                elif self.path == "/api/jobs/":
                    self.answer(api.status, [])
                else:
                    self.answer(404, "no such package")

            def do_PUT(self) -> None:
                api.packages.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(200, {})

            def do_POST(self) -> None:
                api.jobs.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if not api.status:
                    api.ended.wait()
                    return
                self.answer(api.status, {"job_id": "job-1", "submission_id": "job-1"})

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobsApi]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    server = JobsApi()
    yield server
    server.close()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path / "job.toml", job_fields("corpus.parquet", TEACHERS, "s3://bucket/labels"))


def env_file(folder: Path, text: str) -> Path:
    path = folder / "env.toml"
    path.write_text(text, encoding="utf-8")
    return path


# The job file


def test_a_job_file_says_the_same_when_written_and_read(tmp_path: Path) -> None:
    odd = '\N{GRINNING FACE} \x7f \x01 " \\ \n ü \N{LINE SEPARATOR}'
    job = make_job(
        f"/corpora/{odd}.parquet",
        [*TEACHERS, TeacherConfig(bundle=f"/teachers/{odd}", weight=1e-30)],
        "s3://bucket/labels",
        corpus__splits=["train", odd],
        destination__storage_options={odd: {"deep": [1, 2.5, True, {"x": odd}]}, "": 1e22},
        targets__temperatures=[1.0, 2.0],
    )
    (tmp_path / "job.toml").write_text(to_toml(job), encoding="utf-8")
    assert load_job(tmp_path / "job.toml") == job


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e-300, 2**62, "\U0010ffff", {"a b": [[], {}]}])
def test_values_in_toml(value: Any) -> None:
    assert tomllib.loads(f"value = {toml_value(value)}") == {"value": value}


# The runtime environment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[env_vars]\nWANDB_API_KEY = "planted"', "env_vars.WANDB_API_KEY looks like a credential"),
        ('[env_vars]\nPGPASSWORD = "planted"', "env_vars.PGPASSWORD looks like a credential"),
        ('[env_vars]\nHF_TOKEN = "planted"', "env_vars.HF_TOKEN looks like a credential"),
        ('[env_vars]\nAZURE_STORAGE_SAS = "planted"', "env_vars.AZURE_STORAGE_SAS looks like a credential"),
        ('[env_vars]\nAWS_ENDPOINT_URL = "https://user:planted@host"', "env_vars.AWS_ENDPOINT_URL: the https:// URL"),
        ('pip = ["numpy", "--extra-index-url=https://user:planted@host/simple"]', "pip: the https:// URL"),
        ('pip = ["pkg @ git+https://planted@host/pkg.git"]', "pip: the git+https:// URL"),
        ('py_modules = ["https://host/a.zip,s3://key:planted@bucket/b.zip"]', "py_modules: the s3:// URL"),
        ('[conda]\ndependencies = [{pip = ["--index-url https://u:planted@h"]}]', "conda.dependencies.pip: the https:"),
        ('[container]\nregistry-password = "planted"', "container.registry-password looks like a credential"),
        ('[container]\nregistryPassword = "planted"', "container.registryPassword looks like a credential"),
        ('[env_vars]\nAZURE_STORAGE_KEY = "planted"', "env_vars.AZURE_STORAGE_KEY looks like a credential"),
        ('[env_vars]\nDB_PASS = "planted"', "env_vars.DB_PASS looks like a credential"),
    ],
)  # fmt: skip
def test_credentials_anywhere_in_a_runtime_environment_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_runtime_env(env_file(tmp_path, text))
    assert message in str(caught.value)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "lines", "message"),
    [
        ('pip = "{}"', "requirements.txt", "numpy\n--extra-index-url https://u:planted@h/simple", "pip.packages: the https"),
        ('pip = {{packages = "{}"}}', "requirements.txt", "pkg @ git+https://planted@h/p.git", "pip.packages: the git+https"),
        ('uv = "{}"', "requirements.txt", "--index-url https://u:planted@h/simple\nnumpy", "uv.packages: the https"),
        ('conda = "{}"', "conda.yaml", "channels: ['https://u:planted@h/c']", "conda.channels: the https"),
        ('conda = "{}"', "conda.yml", "variables: {1: 2, HF_TOKEN: planted}", "conda.variables.HF_TOKEN looks like a cred"),
    ],
)  # fmt: skip
def test_credentials_in_files_of_packages_are_refused(
    tmp_path: Path, text: str, name: str, lines: str, message: str
) -> None:
    """Ray reads these files and sends their lines."""
    (tmp_path / name).write_text(lines)
    with pytest.raises(InputError) as caught:
        load_runtime_env(env_file(tmp_path, text.format(tmp_path / name)))
    assert message in str(caught.value)
    assert "planted" not in str(caught.value)


def test_files_of_packages_without_credentials_are_left_to_ray(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("numpy\n--extra-index-url https://host/simple\n")
    text = f'pip = "{tmp_path}/requirements.txt"'
    assert load_runtime_env(env_file(tmp_path, text)) == tomllib.loads(text)


def test_what_only_resembles_a_credential_passes(tmp_path: Path) -> None:
    text = (
        'pip = ["numpy", "pkg @ git+https://host/pkg.git@v1", "git+ssh://git@host/pkg.git"]\n'
        '[env_vars]\nTOKENIZERS_PARALLELISM = "false"\nDISASTER = "1"\nKEYBOARD = "de"\nPROXY = "http://host:8080"\n'
        'PWD = "/work"\nENDPOINT = "http://${HOST}:${PORT}/v1"\n'
        'BYPASS = "1"\nPASS_THROUGH = "1"\nKEY_PREFIX = "a"\nRAY_AUTH_MODE = "x"\nAUTHOR = "b"\n'
    )
    assert load_runtime_env(env_file(tmp_path, text)) == tomllib.loads(text)


@pytest.mark.parametrize("text", ['env_vars = "x"', "[env_vars]\nOMP_NUM_THREADS = 1", 'env_vars = ["A=1"]'])
def test_variables_that_are_no_table_of_strings(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="env_vars must be a table of strings"):
        load_runtime_env(env_file(tmp_path, text))


def test_a_working_directory_with_a_file_of_our_name(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / ".softlabels-job.toml").write_text("theirs")
    with pytest.raises(InputError, match=r"working_dir holds \.softlabels-job\.toml"):
        load_runtime_env(env_file(tmp_path, 'working_dir = "code"'))


# Submitting


@pytest.mark.parametrize("rules", ["*\n", ".*\n", "*.toml", "/.softlabels-job.toml\nsecret.env\n"])
@pytest.mark.parametrize("name", [".gitignore", ".rayignore"])
def test_the_job_file_is_sent_whatever_is_ignored(
    tmp_path: Path, api: JobsApi, job: Path, name: str, rules: str
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "secret.env").write_text("planted")
    (code / "job.toml").write_text("theirs")
    (code / name).write_text(f"{rules}\nsecret.env")
    (code / name).chmod(0o444)
    environment = env_file(tmp_path, 'working_dir = "code"\nexcludes = ["*.toml", "/code"]\n')
    assert Cluster(api.url).submit(job, environment) == "job-1"
    with zipfile.ZipFile(io.BytesIO(api.packages[0])) as package:
        sent = tomllib.loads(package.read(".softlabels-job.toml").decode())
        assert "secret.env" not in package.namelist()
    assert sent["destination"]["url"] == "s3://bucket/labels"
    assert api.jobs[0]["entrypoint"].endswith(" run .softlabels-job.toml")
    assert (code / name).read_text() == f"{rules}\nsecret.env"


def test_rules_that_ray_could_not_read(tmp_path: Path, api: JobsApi, job: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / ".gitignore").write_bytes(b"\xe9")
    with pytest.raises(InputError, match=r"code/\.gitignore is not UTF-8, as which Ray reads it"):
        Cluster(api.url).submit(job, env_file(tmp_path, 'working_dir = "code"'))


def test_a_file_named_as_a_job_file_is_sent_as_it_is(tmp_path: Path, api: JobsApi, job: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "job.toml").write_text("theirs")
    Cluster(api.url).submit(job, env_file(tmp_path, 'working_dir = "code"'))
    with zipfile.ZipFile(io.BytesIO(api.packages[0])) as package:
        assert package.read("job.toml") == b"theirs"


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_no_variable_wins_over_the_address(api: JobsApi, job: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    Cluster(api.url).submit(job)
    assert len(api.jobs) == 1
    assert os.environ[name] == "http://127.0.0.1:1"


def test_the_variables_stay_where_no_cluster_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    with pytest.raises(InputError, match=r"no Ray Jobs API answers at http://127\.0\.0\.1:1 "):
        Cluster("http://127.0.0.1:1")
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pip = 5", r"env\.toml: Ray does not take these packages: .* got <class 'int'>"),
        ('pip = "no-such-file.txt"', r"env\.toml: Ray does not take these packages: no-such-file\.txt is not a valid file"),
        ('working_dir = "code"\npip = ["a"]\nconda = "b"', r"env\.toml: Ray does not take these packages: "),
        ("py_modules = [5]", "did not take the job: "),
    ],
)  # fmt: skip
def test_a_runtime_environment_that_ray_refuses(
    tmp_path: Path, api: JobsApi, job: Path, text: str, message: str
) -> None:
    (tmp_path / "code").mkdir()
    with pytest.raises(InputError, match=message):
        Cluster(api.url).submit(job, env_file(tmp_path, text))
    assert api.jobs == []


def test_a_cluster_that_fails(api: JobsApi, job: Path) -> None:
    cluster, api.status = Cluster(api.url), 500
    with pytest.raises(InputError, match="did not take the job: Request failed with status code 500"):
        cluster.submit(job)
    with pytest.raises(InputError, match="did not stop the job: Request failed with status code 500"):
        cluster.stop(job)


def test_a_silent_cluster_is_not_waited_for(api: JobsApi, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_TIMEOUT_SECONDS", (10.0, 0.2))
    cluster, api.status = Cluster(api.url), 0
    with pytest.raises(OSError, match="timed out"):
        cluster.submit(job)


# Following


class BreakingClient:
    """Breaks the log's stream in each way of ``breaks``, then brings the rest; the job has ended when all was read."""

    def __init__(self, breaks: list[BaseException | str]) -> None:
        self.breaks, self.log = breaks, "".join(f"line {number}\n" for number in range(10))
        self.num_streams = 0
        self.num_lost = 0
        self.status = JobStatus.RUNNING

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        """Chunks of another length each time, and further into the log."""
        stream = self.num_streams
        self.num_streams += 1
        end = len(self.log) if stream >= len(self.breaks) else 12 + 15 * stream
        for start in range(0, end, 5 + stream):
            yield self.log[start : min(end, start + 5 + stream)]
        if stream < len(self.breaks):
            how = self.breaks[stream]
            if isinstance(how, BaseException):
                raise how
            # Silence.
            await asyncio.Event().wait()
        self.status = JobStatus.SUCCEEDED

    def get_job_info(self, _: str) -> Any:
        if self.num_lost:
            self.num_lost -= 1
            raise ConnectionError("the head restarts")
        return SimpleNamespace(status=self.status, message="", driver_exit_code=0)

    def get_job_logs(self, _: str) -> str:
        return self.log


def follow(client: BreakingClient, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr(submit, "_Client", lambda _: client)
    monkeypatch.setattr(submit, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "_SILENT_SECONDS", 0.1)
    written: list[str] = []
    code = Cluster("http://fake").follow("job-1", written.append)
    return code, "".join(written)


@pytest.mark.parametrize(
    "breaks",
    [
        [RuntimeError("closed unexpectedly with close code 1006"), RuntimeError("again")],
        [aiohttp.ClientPayloadError("broken"), ConnectionResetError()],
        ["silence", aiohttp.WSServerHandshakeError(None, (), status=502)],  # type: ignore[arg-type]
        ["silence", "silence"],
    ],
)
def test_no_line_is_repeated_or_lost(breaks: list[BaseException | str], monkeypatch: pytest.MonkeyPatch) -> None:
    client = BreakingClient(breaks)
    assert follow(client, monkeypatch) == (0, client.log)
    assert client.num_streams == 3


def test_a_cluster_that_is_away_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    client = BreakingClient([RuntimeError()])
    client.num_lost = 3
    assert follow(client, monkeypatch) == (0, client.log)


def test_a_cluster_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    client = BreakingClient([RuntimeError()])
    client.num_lost = 10**9
    monkeypatch.setattr(submit, "_LOST_SECONDS", 0.1)
    with pytest.raises(ConnectionError, match=r"lost sight of job-1: .*the job may go on"):
        follow(client, monkeypatch)


def test_an_output_that_is_closed_ends_the_following(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a broken connection."""
    client = BreakingClient([])
    monkeypatch.setattr(submit, "_Client", lambda _: client)

    def write(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Cluster("http://fake").follow("job-1", write)
