"""KubeRay's custom resources, strictly: the fields of ``ray.io/v1`` that manifests here may have, and their types.

After the published reference (``docs/reference/api.md`` of KubeRay, at 0057210e); a template of pods is checked against
Kubernetes' own schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import kubernetes_validate
from pydantic import AfterValidator, Field

from softlabel_schemas.strict import StrictModel

KUBERNETES = "1.31"
Count = Annotated[int, Field(ge=0)]
Quantities = dict[str, str]


def check_core(resource: dict[str, Any]) -> dict[str, Any]:
    """A resource of Kubernetes itself. Raises for unknown fields too."""
    kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    return resource


def _check_template(template: dict[str, Any]) -> dict[str, Any]:
    assert set(template) <= {"metadata", "spec"}
    # A pod's own restart policy is KubeRay's business in its groups.
    check_core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]})
    return template


PodTemplate = Annotated[dict[str, Any], AfterValidator(_check_template)]


class Resources(StrictModel):
    requests: Quantities
    limits: Quantities


class AutoscalerOptions(StrictModel):
    idleTimeoutSeconds: Count
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    resources: Resources


class HeadGroup(StrictModel):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(StrictModel):
    groupName: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: PodTemplate


class ClusterSpec(StrictModel):
    rayVersion: str
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: tuple[WorkerGroup, ...]


class JobSpec(StrictModel):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]
    backoffLimit: Count
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    submitterPodTemplate: PodTemplate
    rayClusterSpec: ClusterSpec


class Metadata(StrictModel):
    name: str
    namespace: str


class RayCluster(StrictModel):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class RayJob(StrictModel):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec
