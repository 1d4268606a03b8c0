"""An engine of the worst manners: a tree of processes that a plain kill of its root would leave behind.

`process_tree.py FOLDER [--root wait|finish|crash|polite]` starts, below its root, a child, a grandchild, a child and a
grandchild in sessions of their own, a daemon (forked twice), one that ignores SIGTERM and one that keeps printing.
Each writes `role pid start_tick` to a file of its own in FOLDER, so that who is left can be seen without any mark.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROLES = ("root", "child", "grandchild", "session-child", "session-grandchild", "daemon", "stubborn", "chatty")


def start_tick(pid: int) -> int | None:
    """When `pid` was started; None where it does not run (a zombie does not)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def survivors(folder: Path) -> list[str]:
    """The roles that still run, by what the processes have said of themselves."""
    roles = []
    for file in sorted(folder.glob("*.pid")):
        role, pid, tick = file.read_text().split()
        if start_tick(int(pid)) == int(tick):
            roles.append(role)
    return roles


def is_complete(folder: Path) -> bool:
    """Whether every role has come up."""
    return len(list(folder.glob("*.pid"))) == len(ROLES)


def announce(folder: Path, role: str) -> None:
    draft = folder / f"{role}.draft"
    draft.write_text(f"{role} {os.getpid()} {start_tick(os.getpid())}\n")
    draft.rename(folder / f"{role}.pid")


def fork(life: Callable[[], None]) -> None:
    if os.fork() == 0:
        life()
        os._exit(0)


def live(folder: Path, role: str, then: Callable[[], None] | None = None, *, session: bool = False) -> None:
    if session:
        os.setsid()
    announce(folder, role)
    if then is not None:
        then()
    while True:
        time.sleep(60)


def stubborn(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    live(folder, "stubborn")


def chatty(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    announce(folder, "chatty")
    while True:
        print(f"still printing, I of {folder.name}", flush=True)
        time.sleep(0.01)


def daemon(folder: Path) -> None:
    os.setsid()
    fork(lambda: live(folder, "daemon"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", choices=["wait", "finish", "crash", "polite"], default="wait")
    args = parser.parse_args()
    folder: Path = args.folder
    announce(folder, "root")
    fork(lambda: live(folder, "child", lambda: fork(lambda: live(folder, "grandchild"))))
    grandchild = lambda: fork(lambda: live(folder, "session-grandchild", session=True))  # noqa: E731
    fork(lambda: live(folder, "session-child", grandchild, session=True))
    for life in (daemon, stubborn, chatty):
        fork(lambda life=life: life(folder))  # type: ignore[misc]
    if args.root == "polite":
        signal.signal(signal.SIGTERM, lambda *_: (print("shut down in order", flush=True), sys.exit(0)))
    while not is_complete(folder):
        time.sleep(0.01)
    print("tree complete", flush=True)
    while args.root in ("wait", "polite"):
        time.sleep(60)
    sys.exit(3 if args.root == "crash" else 0)


if __name__ == "__main__":
    main()
