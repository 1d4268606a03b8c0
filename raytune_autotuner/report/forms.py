"""What is served, and the text that serves it: launch line, `--config` file, `docker run`, Compose file, Kubernetes.

Values are argument lists wherever the format has them, and quoted where it has not. A secret is never written, but
taken from where it is run. It knows no study and no trial: where a setting comes from is text that it passes on.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_autotuner.report.wording import comment
from raytune_autotuner.study.masking import MASK, assignment
from raytune_autotuner.study.plain import dump_yaml

PORT = 8000
SERVE = ("vllm", "serve")
MOUNT = "/model"
"""Where a model's folder is mounted."""
_HUB_CACHE = "/root/.cache/huggingface"
"""In the container: where vLLM's image, whose user is root, keeps what it fetches from the hub."""
_HUB_TOKEN = "HF_TOKEN"
_SHARED_MEMORY = "16Gi"
_STARTUP_S = 3600


@dataclass(frozen=True)
class Serving:
    """What is served, independent of the form."""

    name: str
    """Of the service: a DNS label."""
    model: str
    """A hub id, or a folder on the machine of the study."""
    served_name: str
    arguments: tuple[str, ...]
    """Of the engine, the model and the address left out."""
    config: Mapping[str, Any]
    """The same as names and values."""
    env: Mapping[str, str]
    image: str
    gpus: int
    """0: none."""
    provenance: Mapping[str, str]
    """Short name to text: study, trial, versions, figures."""
    secrets: tuple[str, ...] = ()
    """Environment variables whose values are taken from where it is run."""
    entry: tuple[str, ...] = SERVE
    """What starts the engine that was measured, in front of the model; an image has `SERVE`."""

    @property
    def folder(self) -> Path | None:
        """The model's folder; None for a model of the hub."""
        return Path(self.model) if self.model.startswith("/") else None

    @property
    def here(self) -> tuple[str, ...]:
        """The engine's command outside a container."""
        return (*self.entry, self.model, *self._served("127.0.0.1"))

    @property
    def inside(self) -> tuple[str, ...]:
        """The engine's command in a container."""
        return (*SERVE, MOUNT if self.folder else self.model, *self._served("0.0.0.0"))

    def _served(self, host: str) -> tuple[str, ...]:
        return ("--served-model-name", self.served_name, *self.arguments, "--host", host, "--port", str(PORT))


def launch_line(serving: Serving) -> str:
    """A shell script of one command, on this machine only."""
    return _commented(serving) + _shell([*_assignments(serving), *serving.here])


def config_file(serving: Serving) -> str:
    """The file for `vllm serve --config`; the environment, which it cannot hold, as comments."""
    head = _commented(serving)
    if serving.env:
        assignments = [f"  {assignment(name, value)}" for name, value in serving.env.items()]
        head += comment(["Set these in its environment first:", *assignments])
    return head + dump_yaml({"model": serving.model, "served-model-name": serving.served_name, **serving.config})


def docker_run(serving: Serving) -> str:
    """A `docker run` line."""
    parts = ["docker", "run", "--rm", "--name", serving.name, "--ipc", "host"]
    parts += ["--publish", f"127.0.0.1:{PORT}:{PORT}"]
    parts += ["--gpus", str(serving.gpus)] if serving.gpus else []
    for name in (*_passed(serving), *(f"{name}={value}" for name, value in serving.env.items())):
        parts += ["--env", name]
    volume = f"{serving.folder}:{MOUNT}:ro" if serving.folder else f"huggingface:{_HUB_CACHE}"
    entry, *arguments = serving.inside
    return _commented(serving) + _shell([*parts, "--volume", volume, "--entrypoint", entry, serving.image, *arguments])


def compose_file(serving: Serving) -> str:
    """A Compose file with one service."""
    entry, *arguments = serving.inside
    mount = (
        {"type": "bind", "source": str(serving.folder), "target": MOUNT, "read_only": True}
        if serving.folder
        else {"type": "volume", "source": "huggingface", "target": _HUB_CACHE}
    )
    environment: dict[str, str | None] = {**dict.fromkeys(_passed(serving)), **serving.env}
    service: dict[str, Any] = {
        "image": serving.image,
        "entrypoint": [entry],
        "command": arguments,
        "environment": environment,
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "volumes": [mount],
        "ipc": "host",
        "restart": "unless-stopped",
        "labels": {f"raytune-autotuner.{name}": text for name, text in serving.provenance.items()},
    }
    if serving.gpus:
        device = {"driver": "nvidia", "count": serving.gpus, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    volumes = {} if serving.folder else {"volumes": {"huggingface": None}}
    document = {"services": {serving.name: {k: v for k, v in service.items() if v != {}}}, **volumes}
    return _commented(serving) + dump_yaml(_doubled(document))


def kubernetes_files(serving: Serving) -> str:
    """A Deployment and a Service, as one YAML stream."""
    labels = {"app.kubernetes.io/name": "vllm", "app.kubernetes.io/instance": serving.name}
    notes = {f"raytune-autotuner/{name}": text for name, text in serving.provenance.items()}
    meta = {"name": serving.name, "labels": labels, "annotations": notes}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # two at once would want twice the GPUs
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels, "annotations": notes}, "spec": _pod(serving)},
        },
    }
    ports = [{"name": "http", "port": PORT, "targetPort": "http"}]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"selector": labels, "ports": ports}}
    return _commented(serving) + dump_yaml(deployment) + "---\n" + dump_yaml(service)


def _pod(serving: Serving) -> dict[str, Any]:
    entry, *arguments = serving.inside
    probe = {"httpGet": {"path": "/health", "port": "http"}}
    mount: dict[str, Any] = {"name": "model", "mountPath": MOUNT if serving.folder else _HUB_CACHE}
    mount |= {"readOnly": True} if serving.folder else {}
    source = {"hostPath": {"path": str(serving.folder), "type": "Directory"}} if serving.folder else {"emptyDir": {}}
    memory = {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}
    container = {
        "name": "vllm",
        "image": serving.image,
        "command": [entry],
        "args": [_unexpanded(part) for part in arguments],
        "env": _pod_environment(serving),
        "ports": [{"name": "http", "containerPort": PORT}],
        "startupProbe": {**probe, "periodSeconds": 10, "failureThreshold": _STARTUP_S // 10},
        "readinessProbe": {**probe, "periodSeconds": 5},
        "livenessProbe": {**probe, "periodSeconds": 10, "failureThreshold": 3},
        "volumeMounts": [mount, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    if serving.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": serving.gpus}}
    volumes = [{"name": "model", **source}, {"name": "shared-memory", "emptyDir": memory}]
    # Links to a Service put VLLM_..._PORT into the environment, which vLLM takes for its own.
    return {
        "enableServiceLinks": False,
        "containers": [{k: v for k, v in container.items() if v != []}],
        "volumes": volumes,
    }


def _pod_environment(serving: Serving) -> list[dict[str, Any]]:
    """Plain values, and secrets from a Secret of the service's name, by the key of the variable's."""
    plain = [{"name": name, "value": _unexpanded(value)} for name, value in serving.env.items()]
    secret = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": serving.name, "key": name, "optional": True}}}
        for name in _passed(serving)
    ]
    return plain + secret


def _passed(serving: Serving) -> list[str]:
    """The variables whose values come from where it is run; a model of the hub may need a token."""
    token = () if serving.folder or _HUB_TOKEN in serving.env else (_HUB_TOKEN,)
    return list(dict.fromkeys((*serving.secrets, *token)))


def _assignments(serving: Serving) -> list[str]:
    """`env NAME=value` in front of a command; a secret is the caller's own."""
    if not serving.env:
        return []
    return ["env", *(f"{name}={value}" for name, value in serving.env.items())]


def _commented(serving: Serving) -> str:
    lines = ["Found by raytune_autotuner.", *(f"{name}: {text}" for name, text in serving.provenance.items())]
    if serving.secrets:
        lines.append(f"Secrets, to be given where it runs: {', '.join(serving.secrets)}.")
    if any(MASK in part for part in (*serving.arguments, *serving.env.values())):
        lines.append(f"{MASK} stands for a secret, which was not kept: put it in again.")
    return comment(lines)


def _shell(parts: Sequence[str]) -> str:
    """A command quoted for a shell, an option a line."""
    lines = [""]
    for part in parts:
        quoted = shlex.quote(part)
        if part.startswith("-") and lines[-1]:
            lines.append(quoted)
        else:
            lines[-1] = f"{lines[-1]} {quoted}".strip()
    return " \\\n  ".join(lines) + "\n"


def _unexpanded(text: str) -> str:
    """Kubernetes puts a variable in place of `$(NAME)`, and a `$` in place of `$$`."""
    return text.replace("$", "$$")


def _doubled(value: Any) -> Any:
    """Compose puts a variable in place of `$NAME`, and a `$` in place of `$$`."""
    if isinstance(value, str):
        return value.replace("$", "$$")
    if isinstance(value, dict):
        return {key: _doubled(inner) for key, inner in value.items()}
    return [_doubled(inner) for inner in value] if isinstance(value, list) else value
