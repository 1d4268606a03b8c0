"""GPUs asked through NVML's C interface: a library of the same name and functions stands in for the driver's.

It is found as the real one is, by the loader, and reads the devices' state from a file. A device's memory is held by a
process, and free again when that is gone, as the driver has it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.engine.contract import Launch
from raytune_autotuner.engine.gpus import TOLERANCE_MIB, EnergyMeter, gpus_here
from raytune_autotuner.engine.processes import FileLock, make_mark, sweep
from raytune_autotuner.engine.reading import VLLM_RULES
from raytune_autotuner.engine.server import EngineServer

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler to make a stand-in for NVML with")

ROOT = Path(__file__).parent.parent
NOT_SUPPORTED, IS_LOST = 3, 15
LIBRARY = r"""
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } memory_info;
typedef struct { char uuid[96]; unsigned long long idle, used, energy; int holder, memory_error, energy_error; } device;

static unsigned read_devices(device *found) {
  unsigned count = 0;
  FILE *file = fopen(getenv("NVML_STAND_IN"), "r");
  while (file && count < 16) {
    device *d = &found[count];
    if (fscanf(file, "%95s %llu %llu %llu %d %d %d", d->uuid, &d->idle, &d->used, &d->energy,
               &d->holder, &d->memory_error, &d->energy_error) != 7) break;
    count++;
  }
  if (file) fclose(file);
  return count;
}

static device of(void *handle) {
  device found[16];
  read_devices(found);
  return found[(uintptr_t)handle - 1];
}

int nvmlInit_v2(void) { return atoi(getenv("NVML_STAND_IN_INIT") ? getenv("NVML_STAND_IN_INIT") : "0"); }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  device found[16];
  if (index >= read_devices(found)) return 2;
  *handle = (void *)(uintptr_t)(index + 1);
  return 0;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  device found[16];
  unsigned count = read_devices(found);
  for (unsigned index = 0; index < count; index++)
    if (!strcmp(found[index].uuid, uuid)) return nvmlDeviceGetHandleByIndex_v2(index, handle);
  return 6;
}

int nvmlDeviceGetMemoryInfo(void *handle, memory_info *answer) {
  device d = of(handle);
  int over = d.holder && kill(d.holder, 0) && errno == ESRCH;
  if (d.memory_error) return d.memory_error;
  answer->total = 80ull << 30;
  answer->used = (over ? d.idle : d.used) << 20;
  answer->free = answer->total - answer->used;
  return 0;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
  device found[16];
  *count = read_devices(found);
  return 0;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length) { return snprintf(name, length, "Stand-in 80GB") < 0; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) { return snprintf(version, length, "550.54.15") < 0; }
"""
COUNTER = r"""
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *answer) {
  device d = of(handle);
  if (d.energy_error) return d.energy_error;
  *answer = d.energy;
  return 0;
}
"""


@dataclass(frozen=True)
class Device:
    """A device's state: memory in MiB, energy in millijoules; NVML's error codes, 0 for none."""

    uuid: str
    idle: int = 500
    used: int = 500
    energy: int = 0
    holder: int = 0
    """The process that holds `used`; without it only `idle` is. 0: nobody gives it back."""
    memory_error: int = 0
    energy_error: int = 0

    @property
    def line(self) -> str:
        return " ".join(str(value) for value in vars(self).values())


class Machine:
    """A machine with NVML and some devices, whose state can be set."""

    def __init__(self, folder: Path, library: Path) -> None:
        self._state = folder / "devices"
        self.environment = {"LD_LIBRARY_PATH": str(library.parent), "NVML_STAND_IN": str(self._state)}

    def has(self, *devices: Device) -> None:
        draft = self._state.with_suffix(".draft")
        draft.write_text("".join(f"{device.line}\n" for device in devices))
        draft.replace(self._state)

    def ask(self, code: str, **environment: str) -> Any:
        """What `code` in a process of this machine, without any packages, leaves in `answer`."""
        prelude = f"import json, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom raytune_autotuner.engine.gpus import *\n"
        command = [sys.executable, "-I", "-S", "-c", f"{prelude}{code}\nprint(json.dumps(answer))"]
        env = {**os.environ, **self.environment, **environment}
        return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, timeout=30).stdout)


def built(folder: Path, source: str) -> Path:
    folder.mkdir()
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(
        [str(COMPILER), "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=source, text=True, check=True
    )
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("nvml") / "lib", LIBRARY + COUNTER)


@pytest.fixture
def machine(tmp_path: Path, library: Path) -> Machine:
    return Machine(tmp_path, library)


# --- memory ---

BEFORE_AND_AFTER = """
import pathlib, os
gpus = GpuMemory({gpus!r})
gpus.remember()
pathlib.Path(os.environ["NVML_STAND_IN"]).write_text({after!r})
gpus.measure()
answer = [gpus.levels, gpus.held]
"""


def before_and_after(machine: Machine, gpus: list[str], before: list[Device], after: list[Device]) -> Any:
    machine.has(*before)
    lines = "".join(f"{device.line}\n" for device in after)
    return machine.ask(BEFORE_AND_AFTER.format(gpus=gpus, after=lines))


def test_memory_is_read_before_and_after(machine: Machine) -> None:
    before, after = [Device("GPU-a"), Device("GPU-b", used=900)], [Device("GPU-a", used=600), Device("GPU-b", used=400)]
    levels, held = before_and_after(machine, ["0", "GPU-b"], before, after)
    assert levels == {"0": [500, 600], "GPU-b": [900, 400]}
    assert held == []


@pytest.mark.parametrize(("more", "held"), [(TOLERANCE_MIB, []), (TOLERANCE_MIB + 1, ["0"])])
def test_what_others_may_have_taken_meanwhile_is_tolerated(machine: Machine, more: int, held: list[str]) -> None:
    found = before_and_after(machine, ["0"], [Device("GPU-a")], [Device("GPU-a", used=500 + more)])
    assert found[1] == held


def test_a_gpu_that_does_not_answer_any_more_has_not_come_back(machine: Machine) -> None:
    lost = Device("GPU-a", memory_error=IS_LOST)
    assert before_and_after(machine, ["0"], [Device("GPU-a")], [lost]) == [{}, ["0"]]


@pytest.mark.parametrize("gpu", ["1", "7", "GPU-b", "MIG-a", "no such thing", ""])
def test_a_gpu_that_nvml_does_not_know_is_not_watched(machine: Machine, gpu: str) -> None:
    known = [Device("GPU-a")]
    assert before_and_after(machine, [gpu, "0"], known, known) == [{"0": [500, 500]}, []]


def test_a_gpu_that_never_answered_is_not_held(machine: Machine) -> None:
    mute = [Device("GPU-a", memory_error=NOT_SUPPORTED)]
    assert before_and_after(machine, ["0"], mute, mute) == [{}, []]


def test_without_the_driver_nothing_is_watched(machine: Machine, tmp_path: Path) -> None:
    machine.has(Device("GPU-a"))
    code = "gpus = GpuMemory(['0']); gpus.remember(); gpus.await_return(); answer = [gpus.levels, gpus.held]"
    assert machine.ask(code, NVML_STAND_IN_INIT="9") == [{}, []]
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    assert machine.ask(code, LD_LIBRARY_PATH=str(tmp_path)) == [{}, []]


def test_memory_that_takes_a_moment_is_waited_for(machine: Machine) -> None:
    machine.has(Device("GPU-a"))
    code = """
import os, pathlib, threading
gpus = GpuMemory(["0"])
gpus.remember()
state = pathlib.Path(os.environ["NVML_STAND_IN"])
idle = state.read_text()
state.write_text(idle.replace(" 500 500 ", " 500 9000 "))
threading.Timer(0.3, state.write_text, [idle]).start()
begun = time.monotonic()
gpus.await_return()
answer = [gpus.held, time.monotonic() - begun >= 0.2]
"""
    assert machine.ask(code) == [[], True]


def test_a_machine_is_told_by_its_gpus_and_their_driver(machine: Machine) -> None:
    machine.has(Device("GPU-a"), Device("GPU-b"))
    assert machine.ask("answer = gpus_and_driver()") == {"gpus": "2 x Stand-in 80GB, 80 GiB", "gpu_driver": "550.54.15"}
    assert machine.ask("answer = gpus_and_driver()", NVML_STAND_IN_INIT="9") == {}


# --- energy ---


def joules(machine: Machine, gpus: list[str], before: list[Device], after: list[Device]) -> Any:
    machine.has(*before)
    lines = "".join(f"{device.line}\n" for device in after)
    code = f"""
import os, pathlib
meter = EnergyMeter({gpus!r})
pathlib.Path(os.environ["NVML_STAND_IN"]).write_text({lines!r})
answer = meter.joules
"""
    return machine.ask(code)


def test_energy_is_what_all_gpus_took_meanwhile(machine: Machine) -> None:
    before = [Device("GPU-a", energy=10**12), Device("GPU-b", energy=500), Device("GPU-c", energy=0)]
    after = [replace(device, energy=device.energy + 2_500) for device in before]
    assert joules(machine, ["0", "GPU-b"], before, after) == 5.0


@pytest.mark.parametrize("gpus", [["0", "1"], ["0", "GPU-x"], ["1"]])
def test_energy_that_one_gpu_does_not_tell_is_none_and_not_zero(machine: Machine, gpus: list[str]) -> None:
    devices = [Device("GPU-a", energy=7), Device("GPU-b", energy_error=NOT_SUPPORTED)]
    assert joules(machine, gpus, devices, devices) is None


def test_a_counter_that_fails_only_later_gives_none(machine: Machine) -> None:
    before = Device("GPU-a", energy=7)
    assert joules(machine, ["0"], [before], [replace(before, energy_error=IS_LOST)]) is None


def test_a_driver_without_the_counter_gives_none(tmp_path: Path) -> None:
    old = Machine(tmp_path, built(tmp_path / "lib", LIBRARY))
    assert joules(old, ["0"], [Device("GPU-a")], [Device("GPU-a")]) is None


def test_a_trial_without_gpus_takes_no_energy_that_could_be_told() -> None:
    assert EnergyMeter([]).joules is None


# --- the supervisor, on such a machine ---

ENGINE = """
import os, sys, time
from pathlib import Path
uuid, holder, error = sys.argv[1:]
holder = os.getpid() if holder == "own" else 0
Path(os.environ["NVML_STAND_IN"]).write_text(f"{uuid} 500 9000 0 {holder} {error} 0\\n")
print("up", flush=True)
time.sleep(60)
"""


def wait_until(condition: Callable[[], Any], limit_s: float = 20.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def uuid(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device's, which also names its lock, so it must not be one that this machine has."""
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    name = f"GPU-stand-in-{os.getpid()}"
    machine.has(Device(name))
    return name


def trial(folder: Path, uuid: str, holder: str = "own", memory_error: int = 0) -> EngineServer:
    """A trial whose engine takes the GPU's memory: `own`, until it ends, or `nobody`'s to give back."""
    engine = Launch((sys.executable, "-S", "-c", ENGINE, uuid, holder, str(memory_error)), {})
    return EngineServer(
        engine,
        1,
        folder,
        rules=VLLM_RULES,
        mark=make_mark("gpu-test", folder.name),
        deadline=time.monotonic() + 60,
        timeout_s=60,
        grace_s=0,
        locks=[f"gpu-{uuid}"],
    )


def run(server: EngineServer) -> None:
    """From the start to the end, with the GPU's memory taken meanwhile."""
    with server:
        wait_until(lambda: server.log_path.exists() and "up" in server.log_path.read_text())


def record(folder: Path) -> Any:
    return json.loads((folder / "process.json").read_text())


def is_locked(uuid: str) -> bool:
    lock = FileLock(f"gpu-{uuid}")
    taken = lock.acquire()
    lock.release()
    return not taken


def test_a_gpu_that_is_back_is_said_and_given_on(tmp_path: Path, uuid: str) -> None:
    run(trial(tmp_path / "first", uuid))
    assert record(tmp_path / "first")["gpu_mib"] == {uuid: [500, 500]}
    assert f"GPU {uuid} is back (500 MiB before, 500 MiB now)" in (tmp_path / "first" / "trial.log").read_text()
    assert not is_locked(uuid)


@pytest.mark.slow
def test_a_gpu_that_does_not_come_back_is_set_aside_until_it_does(tmp_path: Path, machine: Machine, uuid: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(trial(first, uuid, "nobody"))
    assert record(first)["held_gpus"] == [uuid]
    said = f"GPU {uuid} does not come back: SET ASIDE (500 MiB before, 9000 MiB now)"
    assert said in (first / "trial.log").read_text()
    with trial(second, uuid) as waiting:
        wait_until(lambda: waiting.waiting_for == f"gpu-{uuid}")
        assert waiting.pid is None
        machine.has(Device(uuid))
        wait_until(lambda: waiting.pid is not None)
        wait_until(lambda: waiting.log_path.exists() and "up" in waiting.log_path.read_text())
    assert record(second)["held_gpus"] == []
    assert not is_locked(uuid)


@pytest.mark.slow
def test_a_gpu_that_is_lost_in_the_trial_is_set_aside(tmp_path: Path, machine: Machine, uuid: str) -> None:
    run(trial(tmp_path / "first", uuid, memory_error=IS_LOST))
    assert record(tmp_path / "first")["held_gpus"] == [uuid]
    assert is_locked(uuid)
    machine.has(Device(uuid))
    wait_until(lambda: not is_locked(uuid))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    for name in ("first", "second"):
        sweep(make_mark("gpu-test", name))


def test_the_smallest_gpu_is_found_unless_one_does_not_tell(machine: Machine) -> None:
    machine.has(Device("GPU-a"), Device("GPU-b", memory_error=IS_LOST))
    code = "answer = [smallest_gib(names) for names in (['0'], ['GPU-a', '1'], ['7'], [])]"
    assert machine.ask(code) == [80, None, None, None]


LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
REFUSE = """
import json, sys
from raytune_autotuner.engine.vllm import VllmEngine
from raytune_autotuner.study.file import parse_study

folder, python = sys.argv[1:]
space = {"tensor-parallel-size": {"choice": [1, 8]}}
study = {"study": "s", "model": folder, "engine": {"python": python}, "search_space": space}
failures = [VllmEngine(parse_study({**study, "engine": {"python": python, "args": {"tensor-parallel-size": size}}}))
            .refuse({}) for size in (1, 8)]
print(json.dumps([None if failure is None else [failure.kind, failure.evidence] for failure in failures]))
"""


def test_what_the_gpus_of_this_machine_cannot_hold_is_refused(machine: Machine, tmp_path: Path) -> None:
    machine.has(Device("GPU-a"))
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(LARGE))
    python = tmp_path / "python"  # of an environment with the CUDA build: all that is asked of it here is what it has
    python.write_text('#!/bin/sh\necho \'{"vllm": "0.32.0", "torch": "2.11.0"}\'\n')
    python.chmod(0o755)
    command = [sys.executable, "-c", REFUSE, str(tmp_path / "large"), str(python)]
    env = {**os.environ, **machine.environment, "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, timeout=60, cwd=ROOT)
    alone, shared = json.loads(done.stdout)
    assert alone[0] == "out-of-memory"
    assert "80" in alone[1]
    assert shared is None


@pytest.mark.parametrize(
    ("variable", "names"),
    [("", []), ("-1", []), ("0, 1", ["0", "1"]), ("2,-1,3", ["2"]), (" GPU-a ,", ["GPU-a"])],
)
def test_the_gpus_of_this_process_are_read_as_cuda_reads_them(
    variable: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert gpus_here() == names
