"""The ready-made clusters in configs/cluster: valid by schema, and as closed as docs/kubernetes.md says."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raytune_autotuner.cli.program import make_parser
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.masking import is_secret, looks_secret

FOLDER = Path(__file__).parent.parent / "configs" / "cluster"
KUBERAY, ON_PREMISE = FOLDER / "kuberay-rayjob.yaml", FOLDER / "on-premise.yaml"


def _closed(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_POD = {"type": "object"}  # Kubernetes' own schema says the rest
_COUNT = {"type": "integer", "minimum": 0}
_HEAD = _closed("template", serviceType={"enum": ["ClusterIP"]}, rayStartParams=_TEXTS, template=_POD)
_WORKERS = _closed(
    "groupName minReplicas maxReplicas template",
    groupName={"type": "string"},
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    rayStartParams=_TEXTS,
    template=_POD,
)
_CLUSTER = _closed(
    "headGroupSpec rayVersion authOptions",
    rayVersion={"type": "string"},
    authOptions=_closed("mode secretName", mode={"enum": ["disabled", "token"]}, secretName={"type": "string"}),
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
)
_SPEC = _closed(
    "entrypoint rayClusterSpec",
    entrypoint={"type": "string"},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=_COUNT,
    backoffLimit=_COUNT,
    rayClusterSpec=_CLUSTER,
)
RAYJOB = _closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata={"type": "object"},
    spec=_SPEC,
)
"""The part of KubeRay's RayJob that is used here; `RAYJOB_CRD` names a file with the whole."""


@pytest.fixture
def documents() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load_all(KUBERAY.read_text(encoding="utf-8"))
    return {document["kind"]: document for document in found}


@pytest.fixture
def pods(documents: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def containers(pods: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for pod in pods:
        yield from pod["spec"]["containers"]


def test_the_rayjob_is_one(documents: dict[str, dict[str, Any]]) -> None:
    jsonschema.validate(documents["RayJob"], RAYJOB)
    wrong = deepcopy(documents["RayJob"])
    wrong["spec"]["rayClusterSpec"]["authOptions"]["tokenName"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, RAYJOB)


def test_the_rayjob_is_one_by_the_operators_own_definition(documents: dict[str, dict[str, Any]]) -> None:
    if "RAYJOB_CRD" not in os.environ:
        pytest.skip("RAYJOB_CRD names no file with KubeRay's definition of a RayJob")
    crd = yaml.safe_load(Path(os.environ["RAYJOB_CRD"]).read_text(encoding="utf-8"))
    (version,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
    schema = _without_unknown_fields(version["schema"]["openAPIV3Schema"])
    job = {**documents["RayJob"], "metadata": {}}
    jsonschema.Draft7Validator(schema).validate(job)
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["conteiners"] = []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(job)


def _without_unknown_fields(schema: Any) -> Any:
    """As the API server refuses them; texts or numbers where Kubernetes takes both."""
    if isinstance(schema, list):
        return [_without_unknown_fields(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {name: _without_unknown_fields(one) for name, one in schema.items()}
    if plain.pop("x-kubernetes-int-or-string", False):
        plain.pop("pattern", None)
    if "properties" in plain and "x-kubernetes-preserve-unknown-fields" not in plain:
        plain.setdefault("additionalProperties", False)
    return plain


def test_pods_and_objects_are_what_kubernetes_takes(
    documents: dict[str, dict[str, Any]], pods: list[dict[str, Any]]
) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    own = [document for kind, document in documents.items() if kind != "RayJob"]
    for document in (*own, *({"apiVersion": "v1", "kind": "Pod", **pod} for pod in pods)):
        document["metadata"]["name"] = "x"
        validate.validate(document, validate.latest_version(), strict=True)


def test_pods_have_no_more_rights_than_they_need(pods: list[dict[str, Any]]) -> None:
    for pod in pods:
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        assert not [volume for volume in pod["spec"]["volumes"] if "hostPath" in volume]
    for container in containers(pods):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]["requests"]) == set(container["resources"]["limits"]) >= {"cpu", "memory"}


def test_the_policy_covers_every_pod(documents: dict[str, dict[str, Any]], pods: list[dict[str, Any]]) -> None:
    chosen = documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    assert all(chosen <= pod["metadata"]["labels"].items() for pod in pods)


def test_the_head_has_study_and_results_where_the_entrypoint_looks(
    documents: dict[str, dict[str, Any]], pods: list[dict[str, Any]], tmp_path: Path
) -> None:
    python, m, module, *words = shlex.split(documents["RayJob"]["spec"]["entrypoint"])
    assert (python, m, module) == ("python", "-m", "raytune_autotuner")
    arguments = make_parser().parse_args(["run", *words])
    assert arguments.address == "auto"
    mounts = {mount["mountPath"]: mount["name"] for mount in pods[0]["spec"]["containers"][0]["volumeMounts"]}
    sources = {volume["name"]: volume for volume in pods[0]["spec"]["volumes"]}
    study = sources[mounts[str(arguments.study.parent)]]["configMap"]["name"]
    assert study == documents["ConfigMap"]["metadata"]["name"]
    claim = sources[mounts[str(arguments.results)]]["persistentVolumeClaim"]["claimName"]
    assert claim == documents["PersistentVolumeClaim"]["metadata"]["name"]
    (tmp_path / "study.yaml").write_text(documents["ConfigMap"]["data"][arguments.study.name], encoding="utf-8")
    load_study(tmp_path / "study.yaml")


def test_ray_itself_takes_the_on_premise_file() -> None:
    config = yaml.safe_load(ON_PREMISE.read_text(encoding="utf-8"))
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text(encoding="utf-8")))
    validate_config(prepare_config(config))
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_on_premise_ray_asks_for_its_token_and_shows_no_dashboard() -> None:
    config = yaml.safe_load(ON_PREMISE.read_text(encoding="utf-8"))
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "~/.ray/auth_token" in config["file_mounts"]
    for line in (head, worker):
        assert "RAY_AUTH_MODE=token" in line.split()
        assert ". ~/.config/raytune_autotuner.env;" in line


@pytest.mark.parametrize("path", [KUBERAY, ON_PREMISE], ids=lambda path: path.name)
def test_no_secret_stands_in_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not looks_secret(text)
    for document in yaml.safe_load_all(text):
        assert not list(_secret_values(document))


def _secret_values(value: Any) -> Iterator[Any]:
    """Environment variables with a secret name and a value of their own."""
    if isinstance(value, dict):
        if is_secret(str(value.get("name", ""))) and "value" in value:
            yield value
        for inner in value.values():
            yield from _secret_values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _secret_values(inner)
