"""The scripts on machines that are not fit: a message of one to three lines, exit code 2, nothing installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A fresh clone."""
    clone = tmp_path / "my-clone"
    shutil.copytree(root / "scripts", clone / "scripts")
    shutil.copy(root / "pyproject.toml", clone)
    return clone


def test_a_path_with_a_space_is_refused_since_ray_would_wait_for_ever(clone: Path) -> None:
    spaced = clone.rename(clone.with_name("my clone"))
    done = run(spaced, "quickstart", "--install-only")
    assert done.returncode == 2
    assert "path with a space" in done.stderr
    assert not (spaced / ".venv").exists()


def command(clone: Path, name: str, text: str) -> None:
    """Put a command of that name before all others."""
    path = clone.parent / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run(clone: Path, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    bare = {"HOME": str(clone.parent), "PATH": f"{clone.parent / 'bin'}:{os.environ['PATH']}", **env}
    return subprocess.run(
        [clone / "scripts" / script, *arguments], cwd="/", env=bare, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("uname", "echo Darwin", "on Linux only, but this is Darwin"),
        ("df", "printf 'head\\nfs 9 9 2000000 9%% /\\n'", "GB of disk in "),
        (
            "cat",
            '[ "$1" = /sys/fs/cgroup/memory.max ] && echo 2000000000 || exec /bin/cat "$@"',
            "but this machine has 2 GB",
        ),
        ("python3", "exit 1", "PYTHON=/path/to/python3.11"),
        ("python3", "case $2 in *ensurepip*) exit 1;; esac", "apt-get install python3-venv"),
    ],
)
def test_a_machine_that_is_not_fit_is_told_so(clone: Path, name: str, text: str, told: str) -> None:
    command(clone, name, text)
    if "exit 1" in text:
        for version in (11, 12, 13, 14):
            command(clone, f"python3.{version}", "exit 1")
    done = run(clone, "quickstart", "--install-only")
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert len(done.stderr.splitlines()) <= 3
    assert not (clone / ".venv").exists()


def test_an_unknown_option_is_refused(clone: Path) -> None:
    done = run(clone, "install", "--engine", "vllm")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--engine-package SPEC" in done.stderr


def test_an_engine_package_wants_a_name(clone: Path) -> None:
    done = run(clone, "quickstart", "--engine-package")
    assert (done.returncode, "--engine-package wants" in done.stderr) == (2, True)


def test_the_help_of_the_quickstart_is_its_head(clone: Path) -> None:
    assert "scripts/quickstart [--install-only]" in run(clone, "quickstart", "--help").stdout


def a_python(clone: Path, path: str) -> None:
    """A stand-in for an installed Python, which writes down what it is asked."""
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> "' + path + '"\n')
    python.chmod(0o755)


def test_a_second_run_calls_no_pip_and_a_changed_project_does(clone: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    a_python(clone, str(asked))
    assert run(clone, "quickstart", "some.yaml", "--trials", "3").returncode == 0
    first = asked.read_text()
    assert "install -e .[" in first
    assert first.endswith("-m raytune_autotuner some.yaml --trials 3\n")

    asked.unlink()
    assert run(clone, "quickstart", "some.yaml").returncode == 0
    assert "pip" not in asked.read_text()

    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert run(clone, "quickstart", "some.yaml").returncode == 0
    assert "install -e .[" in asked.read_text()


def test_another_engine_package_stays_the_one_that_is_used(clone: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    a_python(clone, str(asked))
    assert run(clone, "install", "--engine-package", "vllm==0.1").returncode == 0
    assert "install -e . vllm==0.1" in asked.read_text()
    asked.unlink()
    assert run(clone, "install").returncode == 0
    assert "pip" not in asked.read_text()
    assert run(clone, "install", "--dev").returncode == 0
    assert "install -e .[dev] vllm==0.1" in asked.read_text()


def test_where_pip_finds_no_cpu_build_of_torch_its_own_index_is_asked(clone: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    a_python(clone, str(asked))
    with (clone / ".venv" / "bin" / "python").open("a") as python:
        python.write(
            f"case \"$*\" in *'install -e'*) grep -q extra-index-url '{asked}' || {{\n"
            "echo 'ERROR: No matching distribution found for torch==2.13.0+cpu; and so on' >&2; exit 1; } ;; esac\n"
        )
    done = run(clone, "install")
    assert done.returncode == 0, done.stderr
    installs = [line for line in asked.read_text().splitlines() if " install " in line]
    assert [line.endswith((" .[cpu]", " .[gpu]")) for line in installs] == [True, False, True]
    assert installs[1].endswith("torch==2.13.0+cpu torchvision torchaudio")


def test_what_pip_could_not_do_is_told_in_its_own_words(clone: Path, tmp_path: Path) -> None:
    a_python(clone, str(tmp_path / "asked"))
    with (clone / ".venv" / "bin" / "python").open("a") as python:
        python.write("case \"$*\" in *'install -e'*) echo 'ERROR: Could not reach it' >&2; exit 1; esac\n")
    done = run(clone, "install")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 2)
    assert "ERROR: Could not reach it" in done.stderr
    assert not (clone / ".venv" / "installed").exists()
