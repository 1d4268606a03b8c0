"""An engine's temporary files go with it, also when nobody was left to remove them."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_autotuner.engine.contract import Launch
from raytune_autotuner.engine.processes import make_mark, sweep_orphans
from raytune_autotuner.engine.reading import VLLM_RULES
from raytune_autotuner.engine.scratch import Scratch, remove_orphans
from raytune_autotuner.engine.server import EngineServer
from raytune_autotuner.study.errors import TrialFailed
from tests.test_supervisor import supervisor_of, wait_until

LITTERS = "import os, socket, tempfile, time; tempfile.mkdtemp(); s = socket.socket(socket.AF_UNIX); "
BINDS = "s.bind(os.environ['TMPDIR'] + '/' + 36 * 'x'); time.sleep(60)"
SHARES = """
import os, signal, time
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
print(f"Starting to load model {memory.name}", flush=True)
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short path: pytest's own are too long for sockets."""
    folder = Path("/tmp") / f"scratch-{os.getpid()}"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    for left in folder.iterdir():
        left.rmdir()
    folder.rmdir()


def engine(workdir: Path, code: str = LITTERS + BINDS) -> EngineServer:
    launch, mark = Launch((sys.executable, "-c", code), {}), make_mark("test", workdir.name)
    until = time.monotonic() + 60
    return EngineServer(launch, 1, workdir, rules=VLLM_RULES, mark=mark, deadline=until, timeout_s=60.0, grace_s=0.1)


def litter(base: Path) -> list[Path]:
    return sorted(path.relative_to(base) for path in base.glob("*/*"))


def test_what_an_engine_leaves_in_its_temporary_folder_goes_with_it(base: Path, tmp_path: Path) -> None:
    with engine(tmp_path):
        wait_until(lambda: len(litter(base)) == 2)
    assert list(base.iterdir()) == []


def test_what_is_left_where_the_supervisor_was_killed_is_found_later(base: Path, tmp_path: Path) -> None:
    with engine(tmp_path):
        wait_until(lambda: len(litter(base)) == 2)
        sweep_orphans()
        assert len(litter(base)) == 2  # its supervisor lives
        os.kill(supervisor_of(tmp_path), signal.SIGKILL)
    wait_until(lambda: sweep_orphans() == [] and list(base.iterdir()) == [])


def test_a_folder_that_is_held_stays(base: Path) -> None:
    with Scratch(os.environ) as scratch:
        assert scratch.path is not None
        assert remove_orphans(os.environ) == []
    assert list(base.iterdir()) == []


def test_compiled_code_is_kept_for_the_next_engine(base: Path) -> None:
    with Scratch({"TMPDIR": str(base)}) as scratch:
        assert Path(scratch.variables["TORCHINDUCTOR_CACHE_DIR"]).parent == base
    with Scratch({"TMPDIR": str(base), "TORCHINDUCTOR_CACHE_DIR": "/elsewhere"}) as scratch:
        assert scratch.variables["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize("folder", ["missing", "x" * 60], ids=["a folder that is not there", "too long for a socket"])
def test_without_a_folder_of_its_own_an_engine_uses_the_usual_one(base: Path, folder: str) -> None:
    if folder != "missing":
        (base / folder).mkdir()
    with Scratch({"TMPDIR": str(base / folder)}) as scratch:
        assert scratch.variables == {}


def test_shared_memory_whose_users_have_all_been_killed_is_given_back(tmp_path: Path) -> None:
    with engine(tmp_path, SHARES) as server, pytest.raises(TrialFailed):
        server.wait_ready()
    (name,) = re.findall(r"Starting to load model (\w+)", (tmp_path / "engine.log").read_text())
    assert not (Path("/dev/shm") / name).exists()
