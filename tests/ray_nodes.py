"""A Ray cluster of several nodes on this machine, each like a machine of its own: for tests and scripts/bench/cluster.

A node has its own network namespace with an address, its own host name and its own processes, which end all at once
with it, as by a power cut; and empty file systems over the folders that machines do not share. All nodes hang on a
bridge in one more network namespace, and nothing in there can reach the machine's own network or be reached from it.

Example:
    with Network() as network:
        head = network.start_head()
        node = network.start_node(cpus=2, hide=[results])
        subprocess.run(head.inside(["python", ...]))
        node.cut_off()
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from raytune_autotuner.engine.processes import state_dir

PORT = 6379
OBJECT_STORE_BYTES = 80_000_000
START_S = 120.0
RAY_START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--block"]
# Its first process is a shell, which reaps what others leave to it.
_BOOT = """
hostname "$1"; mount --bind "$2" /etc/hosts; mount --bind "$3" /etc/resolv.conf; shift 3
while [ "$1" != -- ]; do mount -t tmpfs none "$1" || exit 1; shift; done; shift
"$@" & wait $!
"""
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_raylet_start_wait_time_s": "120",  # several at once on a machine that is busy
    # A node that does not answer counts as dead after some 15 s; Ray's own values make it a minute and more.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


def why_not() -> str | None:
    """Why no such nodes can be made here; None where they can."""
    name = f"autotuner-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
        subprocess.run(["unshare", "--mount", "--pid", "--uts", "--fork", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        return f"network namespaces cannot be made here: {why.strip().splitlines()[-1]}"
    return None


@dataclass
class RayNode:
    """One node: `name` is its host name, `address` its IP address."""

    name: str
    address: str
    namespace: str
    switch: str
    process: subprocess.Popen[bytes]
    log: Path
    options: tuple[str, ...]
    hide: tuple[Path, ...]

    @property
    def init(self) -> int:
        """The first of its processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    @property
    def processes(self) -> list[int]:
        """The processes in its pid namespace, as this machine numbers them."""
        try:
            space = os.readlink(f"/proc/{self.init}/ns/pid")
        except (OSError, IndexError):
            return []
        return [pid for pid in _pids() if _link(f"/proc/{pid}/ns/pid") == space]

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on this node."""
        return ["nsenter", "--target", str(self.init), "--mount", "--net", "--uts", "--pid", *command]

    def await_start(self) -> None:
        """Wait until Ray has started; raises `RuntimeError` where it does not."""
        until = time.monotonic() + START_S
        while "Ray runtime started" not in (said := self.log.read_text(errors="replace")):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{self.name} does not start: {said}")
            time.sleep(0.1)

    def cut_off(self) -> None:
        """Nothing goes out of this node or into it any more."""
        _ip("-n", self.switch, "link", "set", self.name, "down")

    def reconnect(self) -> None:
        """The reverse of `cut_off`."""
        _ip("-n", self.switch, "link", "set", self.name, "up")

    def kill(self) -> None:
        """End all of its processes at once."""
        with suppress(OSError, IndexError):
            os.kill(self.init, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@dataclass
class Network:
    """The bridge, and what hangs on it. A context manager that leaves nothing."""

    prefix: str = field(default_factory=lambda: f"autotuner-{os.getpid()}")
    nodes: list[RayNode] = field(default_factory=list)
    _outside: str | None = None

    def __enter__(self) -> Self:
        self._until_the_end = ExitStack()
        self._logs = Path(self._until_the_end.enter_context(tempfile.TemporaryDirectory()))
        self._switch = self._namespace("switch")
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            node.kill()
        self._until_the_end.close()

    @property
    def address(self) -> str:
        """Of the head, for those who join."""
        return f"{self.nodes[0].address}:{PORT}"

    def start_head(self, *options: str) -> RayNode:
        """The node that all others join; it has no CPUs for trials."""
        own = [f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false", *options]
        head = self._start(["--head", *own], hide=[])
        head.await_start()
        return head

    def start_node(self, *options: str, cpus: float = 1, hide: Sequence[Path] = (), wait: bool = True) -> RayNode:
        """One more node; it sees empty folders in place of `hide`."""
        node = self._start([f"--address={self.address}", f"--num-cpus={cpus:g}", *options], hide)
        if wait:
            node.await_start()
        return node

    def start_again(self, node: RayNode) -> RayNode:
        """A new Ray on a node whose Ray has ended."""
        anew = self._run(node.name, node.address, node.namespace, node.options, node.hide)
        anew.await_start()
        return anew

    def outside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` where there is an address in the network, but no Ray."""
        if self._outside is None:
            self._outside = self._namespace("outside")
            self._connect("outside", "10.77.0.250", self._outside)
        return ["ip", "netns", "exec", self._outside, *command]

    def _start(self, options: Sequence[str], hide: Sequence[Path]) -> RayNode:
        number = len({node.name for node in self.nodes}) + 1
        name, address = f"node{number}", f"10.77.0.{number}"
        namespace = self._namespace(name)
        self._connect(name, address, namespace)
        return self._run(name, address, namespace, options, hide)

    def _run(self, name: str, address: str, namespace: str, options: Sequence[str], hide: Sequence[Path]) -> RayNode:
        apart = [Path("/tmp/ray"), state_dir(), *hide]
        for folder in apart:
            folder.mkdir(parents=True, exist_ok=True)
        own = [f"--node-ip-address={address}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        unshare = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        hosts, resolver = self._logs / f"{name}.hosts", self._logs / "resolv.conf"
        hosts.write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        resolver.touch()  # without a name server nobody waits for one's answer
        shell = ["bash", "-c", _BOOT, "boot", name, str(hosts), str(resolver), *map(str, apart), "--"]
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *unshare, *shell, *RAY_START, *own, *options],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.nodes.append(RayNode(name, address, namespace, self._switch, process, log, tuple(options), tuple(hide)))
        return self.nodes[-1]

    def _namespace(self, name: str) -> str:
        namespace = f"{self.prefix}-{name}"
        _ip("netns", "add", namespace)
        self._until_the_end.callback(_ip, "netns", "del", namespace)
        return namespace

    def _connect(self, name: str, address: str, namespace: str) -> None:
        _ip("-n", self._switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._switch, "link", "set", name, "master", "bridge", "up")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", device, "up")
        # By which Ray finds out its own address; nothing is ever sent there.
        _ip("-n", namespace, "route", "add", "default", "dev", "eth0")


def environment() -> dict[str, str]:
    """For what runs on the nodes: the one token of all clusters that this process makes."""
    return {**os.environ, **_ENVIRONMENT}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
