"""The memory of a trial's GPUs: the level before its engine, and whether it is back after it.

NVML by ctypes, for the supervisor that asks has no packages. Where there is no NVML, or it does not know a GPU, that
GPU is simply not watched. Standard library only.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable

TOLERANCE_MIB = 256
"""What others that share the GPU may have taken meanwhile."""
RETURN_S = 5.0
"""How long the driver may take to give memory back after the last process is gone."""
_POLL_S = 0.1
_MIB = 2**20


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class GpuMemory:
    """Memory in use on some GPUs, by index or UUID, in MiB."""

    def __init__(self, gpus: Iterable[str]) -> None:
        self._gpus = tuple(gpus)
        self._nvml: ctypes.CDLL | None = None
        self._before: dict[str, int] = {}
        self._after: dict[str, int] = {}

    def remember(self) -> None:
        """Take the level from before the engine."""
        self._nvml = _load() if self._gpus else None
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
        """GPU to its level before and at the last measurement."""
        return {gpu: (level, self._after[gpu]) for gpu, level in self._before.items() if gpu in self._after}

    @property
    def held(self) -> tuple[str, ...]:
        """GPUs that have not come back."""
        return tuple(gpu for gpu, (before, after) in self.levels.items() if after > before + TOLERANCE_MIB)

    def _read(self) -> dict[str, int]:
        found = ((gpu, self._used(gpu)) for gpu in self._gpus)
        return {gpu: used for gpu, used in found if used is not None}

    def _used(self, gpu: str) -> int | None:
        if self._nvml is None:
            return None
        handle, memory = ctypes.c_void_p(), _Memory()
        if gpu.isdigit():
            failed = self._nvml.nvmlDeviceGetHandleByIndex_v2(int(gpu), ctypes.byref(handle))
        else:
            failed = self._nvml.nvmlDeviceGetHandleByUUID(gpu.encode(), ctypes.byref(handle))
        if failed or self._nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
            return None
        return int(memory.used) // _MIB


def _load() -> ctypes.CDLL | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if nvml.nvmlInit_v2() else nvml
