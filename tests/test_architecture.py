"""The house's arrows: who may import whom, read from the source and not from what happens to be loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import raytune_autotuner

PACKAGE = Path(raytune_autotuner.__file__).parent
MAY_IMPORT = {
    "study": {"study"},
    "engine": {"study", "engine"},
    "score": {"study", "score"},
    "load": {"study", "score", "load"},
    "report": {"study", "score", "report"},
    "tune": {"study", "engine", "score", "load", "report", "tune"},
}
# Rooms, and single modules.
ONLY_IN = {"ray": {"tune"}, "optuna": {"tune", "report/html/importance.py"}, "vllm": set[str]()}
# Scripts that the engine's own Python runs.
FOREIGN = {"load/bench_serve.py", "engine/vllm_probe.py", "engine/gguf_conversion.py"}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write `from raytune_autotuner...`, not a relative import"
            yield node.module or ""
            if node.module == PACKAGE.name:
                yield from (f"{PACKAGE.name}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_runs_back_up(module: str) -> None:
    room = module.split("/")[0]
    reached = {name.split(".")[1] for name in imports(module) if name.startswith(f"{PACKAGE.name}.")}
    assert room not in MAY_IMPORT or reached & set(MAY_IMPORT) <= MAY_IMPORT[room]
    assert room not in MAY_IMPORT or "cli" not in reached


@pytest.mark.parametrize("module", sorted(set(MODULES) - FOREIGN))
def test_ray_and_optuna_stay_in_tune_and_vllm_outside(module: str) -> None:
    room = module.split("/")[0]
    tops = {name.split(".")[0] for name in imports(module)}
    assert not {name for name, places in ONLY_IN.items() if name in tops and not {room, module} & places}


@pytest.mark.parametrize("script", sorted(FOREIGN))
def test_the_scripts_for_the_engines_python_import_without_an_engine(script: str) -> None:
    body = ast.parse((PACKAGE / script).read_text(encoding="utf-8")).body
    tops = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    tops |= {node.module or "" for node in body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in tops} <= sys.stdlib_module_names


def test_help_waits_for_nothing_that_a_command_needs() -> None:
    asked = f"import sys, {PACKAGE.name}.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {name.split(".")[1] for name in loaded if name.startswith(f"{PACKAGE.name}.")} == {"cli", "study"}
    assert not loaded & {"pydantic", "yaml", "rich", "numpy", "ray", "optuna"}
