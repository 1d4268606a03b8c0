"""Any server with OpenAI's API as an engine: a program that the study names, with placeholders for what varies.

Nothing is known of it but what the study says, so no setting is refused before its start, and its log is read by what
all programs have in common.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from raytune_autotuner.engine import models
from raytune_autotuner.engine.contract import Launch, Rank
from raytune_autotuner.engine.flags import arguments, environment, parallel_size
from raytune_autotuner.engine.reading import ANY_RULES, LogRules
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Failure
from raytune_autotuner.study.space import Params, format_value
from raytune_autotuner.study.study import PLACEHOLDER, Study

HOST, PORT = "127.0.0.1", 8000
"""Where a trial's server listens, and the port of a launch line for people."""
_VERSION_TIMEOUT_S = 120
_VERSION_CHARACTERS = 200


class CommandEngine:
    """The server that `engine.command` starts, for one study's model with its fixed arguments."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._spec = study.engine
        self._python = str(study.engine.python or sys.executable)

    @property
    def rules(self) -> LogRules:
        """What the logs of all programs have in common."""
        return ANY_RULES

    @property
    def base_url(self) -> None:
        """Each trial starts one of its own."""
        return None

    @property
    def served_model(self) -> str:
        """`engine.served_model`, or what stands for {model}."""
        return _filled(self._spec.served_model or "{model}", {"model": self.config_model()})

    @property
    def uses_gpus(self) -> bool:
        """It may; `resources.gpus: 0` for one that does not."""
        return True

    def preflight(self) -> None:
        """Raise `ConfigError` where the program, or a bundled model, is not there."""
        if self._study.model.startswith(models.PREFIX):
            models.check(self._study.model)
        for key, command in (("engine.command", self._spec.command), ("engine.version", self._spec.version)):
            if command:
                self._require(key, _filled(command[0], {"python": self._python}))
        self.versions()

    def refuse(self, params: Params) -> Failure | None:
        """Never: nobody can be asked."""
        return None

    def close(self) -> None:
        """Nothing runs."""

    def launch(self, params: Params, port: int, rank: Rank | None = None) -> Launch:
        """The command that serves `params` on 127.0.0.1:`port`."""
        setting = self._study.setting(params)
        values = self._values(setting, port)
        named = [_filled(part, values) for part in self._spec.command]
        appended = arguments({name: v for name, v in setting.items() if name not in self._spec.placeholders})
        variables = {name: _filled(value, values) for name, value in environment(setting).items()}
        return Launch((*named, *appended), variables, self._spec.ready)

    def launch_lines(self, params: Params) -> tuple[str, str]:
        """The same line twice: it is as plain as the study has it."""
        launch = self.launch(params, PORT)
        line = " ".join([*(f"{n}={shlex.quote(v)}" for n, v in launch.env.items()), shlex.join(launch.argv)])
        return line, line

    def parallel_size(self, params: Params) -> int:
        """By the flags that vLLM and SGLang share; 1 without them."""
        return parallel_size(self._study.setting(params))

    def defaults(self) -> dict[str, Any]:
        """The fixed values of parameters of the space: of others nothing is known."""
        return {name: value for name, value in self._study.fixed.items() if name in self._study.space.by_name}

    def config_model(self) -> str:
        """What stands for {model}: the whole path of a file or folder, else the study's word for it."""
        return self._model

    def versions(self) -> dict[str, str]:
        """The program's name, and the version that `engine.version` prints."""
        return self._versions

    @cached_property
    def _model(self) -> str:
        if self._study.model.startswith(models.PREFIX):
            return models.resolve(self._study.model, self._python)
        return models.absolute(self._study.model, kind="command")

    @cached_property
    def _versions(self) -> dict[str, str]:
        if not self._spec.version:
            return {self._name: "unknown"}
        command = [_filled(part, {"python": self._python}) for part in self._spec.version]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **self._spec.env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_VERSION_TIMEOUT_S,
                text=True,
                errors="replace",
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"engine.version: {shlex.join(command)}: {error}.") from error
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode != 0 or not lines:
            said = lines[-1] if lines else "it said nothing"
            raise ConfigError(
                f"engine.version: {shlex.join(command)} ended with exit code {done.returncode}: "
                f"{said[:_VERSION_CHARACTERS]}.\nCorrect it, or leave it out."
            )
        return {self._name: lines[0][:_VERSION_CHARACTERS]}

    @property
    def _name(self) -> str:
        """The program's; of `python -m package.module` the package's."""
        program, *rest = self._spec.command
        return rest[1].partition(".")[0] if rest[:1] == ["-m"] and len(rest) > 1 else Path(program).name

    def _values(self, setting: Mapping[str, Any], port: int) -> dict[str, str]:
        """What stands for each placeholder."""
        own = {"model": self._model, "host": HOST, "port": str(port), "python": self._python}
        return {**{name: format_value(value) for name, value in setting.items()}, **own}

    def _require(self, key: str, program: str) -> None:
        # As the engine's start will look for it: trials run in folders of their own.
        if "/" in program and not Path(program).is_absolute():
            raise ConfigError(f"{key}: {program!r} is a relative path; write it in full, or a name on the PATH.")
        if shutil.which(program, path=self._spec.env.get("PATH")) is None:
            raise ConfigError(f"{key}: there is no program {program!r} here. Install it, or correct its name or path.")


def _filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with values in place of the placeholders that have one."""
    return PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)
