"""The simulated engine as an engine of a study: this Python's own server process, with vLLM's flag names."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any

from raytune_autotuner import __version__
from raytune_autotuner.engine.contract import Launch, Rank
from raytune_autotuner.engine.flags import arguments, environment, first_rank, flag, is_flag, rank_arguments
from raytune_autotuner.engine.reading import SIMULATED_RULES, LogRules
from raytune_autotuner.engine.refusal import refusal
from raytune_autotuner.engine.simulated.fate import fate, uneven
from raytune_autotuner.engine.simulated.faults import parse_faults
from raytune_autotuner.engine.simulated.log import traceback_of
from raytune_autotuner.engine.simulated.setting import Hardware, Setting, known_flags, nearest_flag
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Failure, Stage
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study

_PROGRAM = "python -m raytune_autotuner.engine.simulated"


class SimulatedEngine:
    """The simulated server for one study; holds no GPU and needs no model."""

    def __init__(self, study: Study) -> None:
        self._study = study

    @property
    def rules(self) -> LogRules:
        """It prints as vLLM does."""
        return SIMULATED_RULES

    @property
    def base_url(self) -> None:
        """Each trial starts one of its own."""
        return None

    @property
    def served_model(self) -> str:
        """The study's model, by whatever name."""
        return self._study.model

    @property
    def uses_gpus(self) -> bool:
        """Its devices are simulated."""
        return False

    def preflight(self) -> None:
        """Raise `ConfigError` for a flag that it does not have, or a value that it cannot read."""
        fixed = {name: [value] for name, value in self._study.engine.args.items()}
        space = {p.name: p.bounds for p in self._study.space.parameters}
        for where, flags in (("engine.args", fixed), ("search_space", space)):
            for name, values in flags.items():
                if is_flag(name):
                    _check(f"{where}.{name}", name, values)

    def refuse(self, params: Params) -> Failure | None:
        """What its parser or its configuration would not take; faults that are put in on purpose are not foreseen."""
        setting = {name: value for name, value in self._study.setting(params).items() if value is not None}
        try:
            asked = Setting.from_params(setting)
            fault = uneven(asked, self._study.resources.nodes) or fate(asked, Hardware.from_params(setting))
        except ConfigError as error:
            return refusal([f"api_server.py: error: argument {error}"], 2, self.rules)
        if fault is None or fault.stage.order > Stage.CONFIGURATION.order:
            return None
        if fault.stage is Stage.ARGUMENTS:
            return refusal([f"api_server.py: error: {fault.message}"], 2, self.rules)
        trace = traceback_of(f"ValueError: {fault.message}", "main", "create_engine_config")
        return refusal(["non-default args: {}", *trace.splitlines()], 1, self.rules)

    def close(self) -> None:
        """Nothing runs."""

    def defaults(self) -> dict[str, Any]:
        """The values in force at the baseline for parameters of the space."""
        in_force = {**known_flags(), **self._study.fixed}
        return {name: in_force[name] for name in self._study.space.by_name if in_force.get(name) is not None}

    def config_model(self) -> str:
        """The name of the model; nothing is loaded."""
        return self._study.model

    def launch(self, params: Params, port: int, rank: Rank | None = None) -> Launch:
        """The command that serves `params` on 127.0.0.1:`port`, or the part of `rank` in that."""
        argv = (*self._command(params, port), *rank_arguments(rank))
        return Launch(argv, environment(self._study.setting(params)))

    def launch_lines(self, params: Params) -> tuple[str, str]:
        """The same line twice: there is no engine elsewhere to launch."""
        line = shlex.join([*self._command(params, 8000), *first_rank(self._study.resources.nodes)])
        return line, line

    def parallel_size(self, params: Params) -> int:
        """Tensor x pipeline parallel size, of simulated devices."""
        setting = self._study.setting(params)
        return int(setting.get("tensor-parallel-size") or 1) * int(setting.get("pipeline-parallel-size") or 1)

    def versions(self) -> dict[str, str]:
        """It is part of this package."""
        return {"simulated": __version__}

    def _command(self, params: Params, port: int) -> list[str]:
        program = [sys.executable, *_PROGRAM.split()[1:]]
        address = ["--host", "127.0.0.1", "--port", str(port), *flag("model", self._study.model)]
        return program + address + arguments(self._study.setting(params))


def _check(where: str, name: str, values: list[Any]) -> None:
    """Raise `ConfigError` where the server would not take one of `values` for its flag `name`."""
    if name not in {*known_flags(), *_READERS}:
        nearest = nearest_flag(name)
        hint = f"Did you mean {nearest!r}?" if nearest else f"See {_PROGRAM} --help"
        raise ConfigError(f"{where}: the simulated engine has no flag --{name}. {hint}")
    read = _READERS.get(name, lambda value: (Setting.from_params({name: value}), Hardware.from_params({name: value})))
    for value in values:
        try:
            read(value)
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error


# Flags of the server that are no part of a setting or of the hardware.
_READERS: dict[str, Callable[[Any], object]] = {
    "fault": lambda value: parse_faults(flag("fault", value)[1:]),
    "seed": int,
}
