"""The files of Ray's cluster launcher and of compose: against the schemas published for them, and against the product."""

from __future__ import annotations

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import fillout_defaults, validate_config

from tests.support.command_lines import ROOT, check_command_line, pinned

LAUNCHER, COMPOSE = ROOT / "deploy" / "aws" / "cluster.yaml", ROOT / "deploy" / "minio" / "compose.yaml"


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(LAUNCHER.read_text())
    return found


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return found


def comments(path: Path) -> list[str]:
    return [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")]


def test_the_launcher_is_what_ray_takes(launcher: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(launcher, schema)
    validate_config(fillout_defaults(launcher))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launcher, "idle_timeout": 5}, schema)


def test_workers_come_from_zero_and_the_head_does_no_work(launcher: dict[str, Any]) -> None:
    head, workers = (launcher["available_node_types"][name] for name in (launcher["head_node_type"], "gpu-spot"))
    assert head["resources"] == {"CPU": 0}
    assert (workers["min_workers"], workers["resources"]["GPU"]) == (0, 1)
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for node, role in ((head, "publisher"), (workers, "writer")):
        assert node["node_config"]["IamInstanceProfile"] == {"Name": f"essence-{role}"}
        assert (ROOT / "deploy" / "iam" / f"{role}.json").exists()


def test_its_images_ports_and_commands_are_the_products(launcher: dict[str, Any]) -> None:
    docker, version = launcher["docker"], pinned("essence-distill")
    assert docker["head_image"] == f"essence-teacher:{version}"
    assert docker["worker_image"] == f"essence-teacher:{version}-cuda"
    assert "--env RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1" in docker["run_options"]
    # NVIDIA's runtime, with which Ray starts the workers, gives a container none that names none.
    assert "--env NVIDIA_VISIBLE_DEVICES=all" in docker["worker_run_options"]
    start = " ".join(launcher["head_start_ray_commands"])
    assert {"--dashboard-host=127.0.0.1", "--dashboard-port=8265", "--num-cpus=0"} <= set(start.split())
    (submit,) = [line for line in comments(LAUNCHER) if line.startswith("teacher-service ")]
    check_command_line(submit)
    assert submit.endswith(":8265")


def test_compose_is_valid(compose: dict[str, Any]) -> None:
    vendored = importlib.resources.files(check_jsonschema) / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(vendored.read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.validate(compose)
    broken = {**compose, "services": {"minio": {**compose["services"]["minio"], "port": []}}}
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(broken)


def test_the_laptops_server_is_on_loopback_and_pinned(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert re.search(r":RELEASE\.20\d\d-", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    # No key is in the file.
    environment = compose["services"]["minio"]["environment"]
    assert all(value.startswith(f"${{{name}:?") for name, value in environment.items())
    assert "127.0.0.1:9000:9000" in compose["services"]["minio"]["ports"]
    assert any("AWS_ENDPOINT_URL=http://127.0.0.1:9000" in line for line in comments(COMPOSE))


def test_only_what_stays_up_is_waited_for(compose: dict[str, Any]) -> None:
    """Compose gives up, with exit status 1, on a service that ends while it waits for it."""
    told = [line.strip() for line in (ROOT / "deploy" / "README.md").read_text().splitlines()]
    commands = [line for line in told if line.startswith("docker compose ")]
    assert commands == [line.strip() for line in comments(COMPOSE) if line.strip().startswith("docker compose ")]
    (up, once) = (line.split() for line in commands)
    staying = {name for name, service in compose["services"].items() if service["restart"] != "no"}
    assert set(up[up.index("--wait") + 1 :]) == staying
    assert once[-3:-1] == ["run", "--rm"]
    assert {once[-1]} == compose["services"].keys() - staying
