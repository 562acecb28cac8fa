"""JOB.toml: what is refused, and what the message says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from softlabel_schemas import InputError
from softlabel_schemas.selection import Mass
from teacher_service.config import TeacherConfig, load_job
from tests.support.teachers import job_fields, make_job, write_job

TEACHERS = [TeacherConfig(bundle="teachers/tdnn"), TeacherConfig(bundle="s3://bucket/blstm", weight=2)]


def load(folder: Path, **changes: Any) -> Any:
    return load_job(write_job(folder / "job.toml", job_fields("corpus.parquet", TEACHERS, "labels", **changes)))


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir(tmp_path)
    job = load(Path("jobs"), destination__url="../labels")
    assert job.corpus.manifest == str(tmp_path / "jobs" / "corpus.parquet")
    assert [teacher.bundle for teacher in job.teachers] == [str(tmp_path / "jobs/teachers/tdnn"), "s3://bucket/blstm"]
    assert Path(job.destination.url).resolve() == tmp_path / "labels"
    assert load(tmp_path, destination__url="s3://bucket/labels").destination.url == "s3://bucket/labels"


def test_defaults_and_what_is_set(tmp_path: Path) -> None:
    job = load(tmp_path, selection={"policy": "mass", "mass": 0.95, "max_entries": 20}, targets__temperatures=[1, 2])
    assert job.selection == Mass(mass=0.95, max_entries=20)
    assert [teacher.weight for teacher in job.teachers] == [1.0, 2.0]
    assert (job.combination.method, job.targets.codec, job.targets.temperatures) == ("arithmetic", "mtf-sqrt", (1, 2))
    assert (job.resources.num_actors, job.errors.on_error, job.destination.format) == (1, "fail", "parquet")
    assert (job.errors.stall_minutes, job.errors.room_minutes) == (15, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets__tempratures": [1.0]}, "targets.tempratures: unknown key 'tempratures'; did you mean 'temperatures'?"),
        ({"resurces": {}}, "resurces: unknown key 'resurces'; did you mean 'resources'?"),
        ({"destination__num_actors": 2}, "destination.num_actors: unknown key 'num_actors' here; it belongs in another table"),
        ({"selection": {"policy": "top_k", "k": 4, "maxentries": 3}}, "unknown key 'maxentries'; did you mean 'max_entries'?"),
        ({"targets__temperatures": [2.0, 1.0]}, "temperatures must start with 1.0, found [2.0, 1.0]"),
        ({"targets__temperatures": []}, "temperatures must start with 1.0, found []"),
        ({"targets__temperatures": [1.0, 2.0, 2.0]}, "temperatures must be distinct and positive, found [1.0, 2.0, 2.0]"),
        ({"targets__temperatures": [1.0, -2.0]}, "temperatures must be distinct and positive, found [1.0, -2.0]"),
        ({"teachers": [{"bundle": "a", "weight": 0}]}, "teachers.0.weight: Input should be greater than 0, found 0"),
        ({"teachers": [{"bundle": "a", "weight": -1.5}]}, "teachers.0.weight: Input should be greater than 0, found -1.5"),
        ({"teachers": [{"bundle": "a", "weight": "heavy"}]}, "teachers.0.weight: Input should be a valid number"),
        ({"teachers": [{"bundle": "a", "weight": 1e308}] * 2}, "the weights run from 1e+308 to 1e+308, of which no shares"),
        ({"teachers": [{"bundle": "a", "weight": w} for w in (1e300, 1e-300)]}, "the weights run from 1e-300 to 1e+300, of"),
        ({"teachers": [{"weight": 1}]}, "teachers.0.bundle: Field required"),
        ({"selection": {"policy": "top_n", "k": 4}}, "selection.policy: 'top_n' is none of 'top_k', 'mass'"),
        ({"selection": {"policy": "mas", "mass": 0.9}}, "'byte_budget'; did you mean 'mass'?"),
        ({"selection": {"policy": "top_k", "k": 0}}, "selection.top_k.k: Input should be greater than or equal to 1, found 0"),
        ({"combination__method": "geometric"}, "combination.method: Input should be 'arithmetic' or 'log_linear'"),
        ({"destination__format": "hdf5"}, "destination.format: Input should be 'parquet' or 'zarr', found 'hdf5'"),
        ({"errors__max_skipped_fraction": 1.5}, "errors.max_skipped_fraction: Input should be less than or equal to 1"),
        ({"resources__num_actors": 0}, "resources.num_actors: Input should be greater than or equal to 1, found 0"),
        ({"resources__gpus_per_actor": 2}, "resources.gpus_per_actor: Input should be less than or equal to 1, found 2"),
        ({"resources__batch_seconds": float("inf")}, "resources.batch_seconds: Input should be a finite number"),
        ({"corpus__splits": []}, "corpus.splits: Tuple should have at least 1 item"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make_job("corpus.parquet", TEACHERS, "labels", **changes)


def test_a_job_without_teachers() -> None:
    with pytest.raises(InputError, match="teachers: at least one teacher is needed, found none"):
        make_job("corpus.parquet", [], "labels")


@pytest.mark.parametrize(
    "options",
    [
        {"key": "AKIA"},
        {"secret": "x"},
        {"client_kwargs": {"aws_secret_access_key": "x"}},
        {"config": {"deep": {"session_token": "x"}}},
        {"sas_token": "x"},
        {"PASSWORD": "x"},
        {"account_key": "x"},
        {"passphrase": "x"},
        {"AZURE_STORAGE_KEY": "x"},
        {"s3_additional_kwargs": {"SSECustomerKey": "x"}},
        {"hmac_key": "x"},
        {"pkey": "x"},
        {"client_kwargs": {"headers": {"Authorization": "x"}}},
        {"auth": ["x", "x"]},
        {"config": {"pass_phrase": "x", "key_content": "x"}},
        {"config": {"key_content": "x"}},
        *(
            {name: "x"}
            for name in ("MYSQL_PWD", "SSHPASS", "REDIS_AUTH", "DOCKER_AUTH_CONFIG", "GITHUB_PAT", "HTTP_BASIC_AUTH")
        ),
    ],
)
def test_credentials_are_refused_without_being_repeated(tmp_path: Path, options: dict[str, Any]) -> None:
    def hidden(value: Any) -> Any:
        return {name: hidden(item) for name, item in value.items()} if isinstance(value, dict) else "hunter2"

    with pytest.raises(InputError, match="looks like a credential; leave it out of job files and set it in") as caught:
        make_job("corpus.parquet", TEACHERS, "labels", destination__storage_options=hidden(options))
    assert "hunter2" not in str(caught.value)


def test_a_private_key_is_refused_under_any_name() -> None:
    options = {"ca": ["-----BEGIN RSA PRIVATE KEY-----\nhunter2"]}
    with pytest.raises(InputError, match=r"storage_options\.ca is a private key") as caught:
        make_job("corpus.parquet", TEACHERS, "labels", destination__storage_options=options)
    assert "hunter2" not in str(caught.value)


def test_other_storage_options_pass() -> None:
    options = {
        "endpoint_url": "http://minio:9000",
        "client_kwargs": {"region_name": "eu-west-1"},
        "s3_additional_kwargs": {"SSEKMSKeyId": "an alias", "SSECustomerAlgorithm": "AES256"},
        "anon": False,
        "gss_auth": True,
        "kerb_kwargs": {"mutual_auth": "REQUIRED", "verify_token": None},
        "hosts": "http://a:2379,http://b:2379",
    }
    job = make_job("corpus.parquet", TEACHERS, "labels", destination__storage_options=options)
    assert job.destination.storage_options == options


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"job\.toml does not exist; give the path of a TOML file"):
        load_job(tmp_path / "job.toml")
    (tmp_path / "job.toml").write_text("[corpus")
    with pytest.raises(InputError, match=r"job\.toml is not valid TOML"):
        load_job(tmp_path / "job.toml")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("corpus.manifest", {"corpus__manifest": "s3://AKIA:hunter2@bucket/corpus.parquet"}),
        ("teachers.0.bundle", {"teachers": [{"bundle": "https://host/teacher?X-Amz-Signature=hunter2"}]}),
        ("teachers.0.bundle", {"teachers": [{"bundle": "https://hunter2@host/teacher"}]}),
        ("destination.url", {"destination__url": "s3://AKIA:hunter2@bucket/labels"}),
        ("destination.url", {"destination__url": "https://[hunter2/labels"}),
        ("storage_options.endpoint_url", {"destination__storage_options": {"endpoint_url": "https://u:hunter2@host"}}),
        ("storage_options.a.b", {"destination__storage_options": {"a": {"b": ["x", "http://hunter2@host"]}}}),
    ],
)
def test_credentials_in_urls_are_refused_without_being_repeated(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"the \w+:// URL (holds|cannot be read)") as caught:
        make_job("corpus.parquet", TEACHERS, "labels", **changes)
    assert name in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_users_and_containers_in_urls_pass() -> None:
    url = "abfs://container@account.dfs.core.windows.net/labels"
    assert make_job("sftp://me@host/corpus.parquet", TEACHERS, url).destination.url == url
