"""The manifests as ``kubectl apply -k`` sends them: valid, what they say they are, and of this product."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from softlabel_schemas import retrying
from softlabel_schemas.strict import parse
from teacher_service.config import load_job
from tests.support import kuberay
from tests.support.command_lines import check_command_line, pinned

ROOT = Path(__file__).parents[3]
KUBERAY = ROOT / "deploy" / "kuberay"
OVERLAYS = ("dev-cpu", "gpu-spot")
Resources = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> dict[str, Resources]:
    """Of each overlay, its resources by kind."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl, which renders the overlays")
    found = {}
    for overlay in OVERLAYS:
        command = ["kubectl", "kustomize", str(KUBERAY / "overlays" / overlay)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        resources = list(yaml.safe_load_all(text))
        accounts = [resource for resource in resources if resource["kind"] == "ServiceAccount"]
        found[overlay] = {resource["kind"]: resource for resource in resources} | {"ServiceAccounts": accounts}
        assert len(resources) == 6
    return found


def pods(resources: Resources) -> dict[str, dict[str, Any]]:
    """Of the RayJob, whose cluster is the RayCluster's."""
    spec = resources["RayJob"]["spec"]
    return {
        "submitter": spec["submitterPodTemplate"]["spec"],
        "head": spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"],
        "worker": spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"],
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_resources_are_valid(rendered: dict[str, Resources], overlay: str) -> None:
    resources = rendered[overlay]
    for resource in (*resources["ServiceAccounts"], resources["ConfigMap"], resources["NetworkPolicy"]):
        kuberay.check_core(resource)
    cluster = parse(kuberay.RayCluster, resources["RayCluster"], where="RayCluster")
    job = parse(kuberay.RayJob, resources["RayJob"], where="RayJob")
    assert job.spec.rayClusterSpec == cluster.spec


def test_an_unknown_field_would_be_found(rendered: dict[str, Resources]) -> None:
    worker = rendered["dev-cpu"]["RayCluster"]["spec"]["workerGroupSpecs"][0]
    spec = worker["template"]["spec"] | {"terminationGracePeriod": 120}
    with pytest.raises(Exception, match="terminationGracePeriod"):
        kuberay._check_template({"spec": spec})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rays_autoscaler_reads_it(rendered: dict[str, Resources], overlay: str) -> None:
    """A head without work, workers from zero, with the resources that the job's actors ask for."""
    config = _derive_autoscaling_config_from_ray_cr(rendered[overlay]["RayCluster"])
    head, workers = config["available_node_types"]["headgroup"], config["available_node_types"]["labellers"]
    assert head["resources"]["CPU"] == 0
    assert (workers["min_workers"], workers["max_workers"]) == (0, {"dev-cpu": 2, "gpu-spot": 16}[overlay])
    job = load_job(KUBERAY / "overlays" / overlay / "job.toml")
    asked = job.resources
    assert asked.cpus_per_actor <= workers["resources"]["CPU"]
    assert asked.gpus_per_actor == workers["resources"].get("GPU", 0)
    assert asked.num_actors <= workers["max_workers"]
    assert job.errors.room_minutes == {"dev-cpu": 30, "gpu-spot": 24 * 60}[overlay]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_job_runs_the_products_command_on_its_own_file(rendered: dict[str, Resources], overlay: str) -> None:
    resources = rendered[overlay]
    entrypoint = resources["RayJob"]["spec"]["entrypoint"]
    check_command_line(entrypoint)
    head = pods(resources)["head"]
    (mount,) = head["containers"][0]["volumeMounts"]
    (volume,) = head["volumes"]
    folder, name = shlex.split(entrypoint)[-1].rsplit("/", 1)
    assert (mount["name"], mount["mountPath"]) == (volume["name"], folder)
    assert volume["configMap"]["name"] == resources["ConfigMap"]["metadata"]["name"]
    (written,) = resources["ConfigMap"]["data"].items()
    assert written == (name, (KUBERAY / "overlays" / overlay / "job.toml").read_text())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_no_privileges_and_one_image(rendered: dict[str, Resources], overlay: str) -> None:
    for name, pod in pods(rendered[overlay]).items():
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"] or name == "submitter"
        cuda = "-cuda" if overlay == "gpu-spot" and name != "submitter" else ""
        assert container["image"] == f"essence-teacher:{pinned('essence-distill')}{cuda}"
    assert rendered[overlay]["RayCluster"]["spec"]["rayVersion"] == pinned("ray")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nodes_see_each_other_and_workers_end_after_their_uploads(rendered: dict[str, Resources], overlay: str) -> None:
    """Where Ray is kept on loopback, as teacher-service does by default, nodes cannot join."""
    for name in ("head", "worker"):
        environment = {each["name"]: each["value"] for each in pods(rendered[overlay])[name]["containers"][0]["env"]}
        assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"
    assert pods(rendered[overlay])["worker"]["terminationGracePeriodSeconds"] >= retrying.GIVE_UP_SECONDS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_accounts_have_a_policy_each(rendered: dict[str, Resources], overlay: str) -> None:
    names = {account["metadata"]["name"] for account in rendered[overlay]["ServiceAccounts"]}
    for name, role in (("head", "publisher"), ("worker", "writer")):
        assert pods(rendered[overlay])[name]["serviceAccountName"] == f"essence-{role}"
        assert (ROOT / "deploy" / "iam" / f"{role}.json").exists()
    assert names == {"essence-publisher", "essence-writer"}


def test_spot_machines_are_tolerated_by_workers_alone(rendered: dict[str, Resources]) -> None:
    workers, head = pods(rendered["gpu-spot"])["worker"], pods(rendered["gpu-spot"])["head"]
    tolerated = {each["key"] for each in workers["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot", "karpenter.sh/capacity-type"} <= tolerated
    assert "tolerations" not in head
    assert workers["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_who_holds_the_job_together_stays_off_spot_machines(rendered: dict[str, Resources]) -> None:
    """Off all that workers prefer: clouds need not taint them."""

    def labels(terms: list[dict[str, Any]], operator: str) -> set[tuple[str, str]]:
        found = [each for term in terms for each in term["matchExpressions"]]
        assert {each["operator"] for each in found} == {operator}
        return {(each["key"], value) for each in found for value in each["values"]}

    affinities = {name: pod["affinity"]["nodeAffinity"] for name, pod in pods(rendered["gpu-spot"]).items()}
    preferred = affinities["worker"]["preferredDuringSchedulingIgnoredDuringExecution"]
    spot = labels([each["preference"] for each in preferred], "In")
    for name in ("head", "submitter"):
        (term,) = affinities[name]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert labels([term], "NotIn") == spot
