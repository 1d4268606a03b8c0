"""GPUs, asked of NVML: their memory, whether it is back after a trial's engine, and the energy of a load.

By ctypes, for the supervisor that asks has no packages. GPUs are named by index, in the order of the PCI bus, or by
UUID. Where there is no NVML, or it does not know a GPU, that GPU is simply not watched. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import Counter
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import TypeAlias

TOLERANCE_MIB = 256
"""What others that share the GPU may have taken meanwhile."""
RETURN_S = 5.0
"""How long the driver may take to give memory back after the last process is gone."""
_POLL_S = 0.1
_MIB = 2**20
_NAME_BYTES = 96
_LIBRARY = "libnvidia-ml.so.1"


def gpus_here() -> list[str]:
    """The GPUs that this process may use, by the names that `CUDA_VISIBLE_DEVICES` takes; as to CUDA, -1 ends them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = (name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(","))
        return [name for name in takewhile(lambda name: not name.startswith("-"), names) if name]
    return [str(index) for index, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def smallest_gib(gpus: Iterable[str]) -> float | None:
    """Memory of the smallest of `gpus`; None where there is none, or one of them does not tell."""
    nvml = _Nvml()
    sizes = [nvml.total_mib(gpu) for gpu in gpus]
    known = [size for size in sizes if size is not None]
    return min(known) / 1024 if known and len(known) == len(sizes) else None


class GpuMemory:
    """Memory in use on some GPUs, in MiB."""

    def __init__(self, gpus: Iterable[str]) -> None:
        self._gpus = tuple(gpus)
        self._nvml: _Nvml | None = None
        self._before: dict[str, int] = {}
        self._after: dict[str, int] = {}

    def remember(self) -> None:
        """Take the level from before the engine."""
        self._nvml = _Nvml() if self._gpus else None
        self._before = self._read()

    def measure(self) -> None:
        """Take the present level."""
        self._after = self._read()

    def await_return(self) -> None:
        """Measure until the level is back, at most for `RETURN_S`."""
        until = time.monotonic() + RETURN_S
        self.measure()
        while self.held and time.monotonic() < until:
            time.sleep(_POLL_S)
            self.measure()

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """GPU to its level before and at the last measurement; without those that gave none."""
        return {gpu: (level, self._after[gpu]) for gpu, level in self._before.items() if gpu in self._after}

    @property
    def held(self) -> tuple[str, ...]:
        """GPUs that have not come back: their memory is still taken, or they do not answer any more."""
        return tuple(
            gpu for gpu, before in self._before.items() if gpu not in self._after or self._has_more(gpu, before)
        )

    def _has_more(self, gpu: str, before: int) -> bool:
        return self._after[gpu] > before + TOLERANCE_MIB

    def _read(self) -> dict[str, int]:
        if self._nvml is None:
            return {}
        found = ((gpu, self._nvml.used_mib(gpu)) for gpu in self._gpus)
        return {gpu: used for gpu, used in found if used is not None}


class EnergyMeter:
    """The energy that some GPUs take from the meter's making on, whoever uses them.

    Example:
        meter = EnergyMeter(["0", "1"])
        ...  # the load
        meter.joules
    """

    def __init__(self, gpus: Iterable[str]) -> None:
        self._gpus = tuple(gpus)
        self._nvml = _Nvml() if self._gpus else None
        self._before_mj = self._read_mj()

    @property
    def joules(self) -> float | None:
        """Of all the GPUs together until now; None where one of them does not count, or there is none."""
        now_mj = self._read_mj()
        return None if now_mj is None or self._before_mj is None else (now_mj - self._before_mj) / 1000

    def _read_mj(self) -> int | None:
        if self._nvml is None:
            return None
        counted = [self._nvml.energy_mj(gpu) for gpu in self._gpus]
        known = [energy for energy in counted if energy is not None]
        return sum(known) if len(known) == len(counted) else None


def describe_gpus(gpus: Iterable[str]) -> str:
    """The kinds of these GPUs with their memory, each kind once: `NVIDIA H100 80GB HBM3, 80 GiB`."""
    nvml = _Nvml()
    return "; ".join(sorted({nvml.describe(gpu) for gpu in gpus}))


def gpus_and_driver() -> dict[str, str]:
    """The machine's GPUs and their driver, for people: `{"gpus": "2 x NVIDIA H100, 80 GiB", "gpu_driver": "550.54"}`.

    Empty where NVML is not there.
    """
    nvml = _Nvml()
    counts = Counter(nvml.names())
    if not counts:
        return {}
    gpus = ", ".join(f"{count} x {name}" for name, count in counts.items())
    driver = nvml.driver_version()
    return {"gpus": gpus, **({} if driver is None else {"gpu_driver": driver})}


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


_Answer: TypeAlias = ctypes.Structure | ctypes.c_ulonglong | ctypes.Array[ctypes.c_char]


class _Nvml:
    """The few questions; each answer is None where NVML is not there, or gives an error."""

    def __init__(self) -> None:
        self._library = _load()

    def used_mib(self, gpu: str) -> int | None:
        memory = self._memory(gpu)
        return None if memory is None else int(memory.used) // _MIB

    def total_mib(self, gpu: str) -> int | None:
        memory = self._memory(gpu)
        return None if memory is None else int(memory.total) // _MIB

    def describe(self, gpu: str) -> str:
        name, memory = ctypes.create_string_buffer(_NAME_BYTES), _Memory()
        if not self._ask("nvmlDeviceGetName", gpu, name, _NAME_BYTES):
            return "a GPU that NVML does not know"
        size = f", {memory.total / 2**30:.0f} GiB" if self._ask("nvmlDeviceGetMemoryInfo", gpu, memory) else ""
        return name.value.decode(errors="replace") + size

    def energy_mj(self, gpu: str) -> int | None:
        """Since the driver was loaded."""
        energy = ctypes.c_ulonglong()
        return energy.value if self._ask("nvmlDeviceGetTotalEnergyConsumption", gpu, energy) else None

    def _memory(self, gpu: str) -> _Memory | None:
        memory = _Memory()
        return memory if self._ask("nvmlDeviceGetMemoryInfo", gpu, memory) else None

    def names(self) -> list[str]:
        """Of all GPUs, in the order of the PCI bus."""
        count = ctypes.c_uint()
        if self._library is None or self._library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        return [self.describe(str(index)) for index in range(count.value)]

    def driver_version(self) -> str | None:
        answer = ctypes.create_string_buffer(_NAME_BYTES)
        if self._library is None or self._library.nvmlSystemGetDriverVersion(answer, _NAME_BYTES):
            return None
        return answer.value.decode(errors="replace")

    def _ask(self, function: str, gpu: str, answer: _Answer, *more: int) -> bool:
        """Fill in `answer`; whether it is one."""
        if self._library is None or not hasattr(self._library, function):
            return False
        handle = ctypes.c_void_p()
        if gpu.isdigit():
            failed = self._library.nvmlDeviceGetHandleByIndex_v2(int(gpu), ctypes.byref(handle))
        else:
            failed = self._library.nvmlDeviceGetHandleByUUID(gpu.encode(), ctypes.byref(handle))
        return not failed and not self._library[function](handle, ctypes.byref(answer), *more)


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library
