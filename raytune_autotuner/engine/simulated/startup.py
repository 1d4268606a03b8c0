"""A start of the simulated engine: arguments in, a bound socket and a loaded "model" out, stage by stage."""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raytune_autotuner.engine.simulated import log
from raytune_autotuner.engine.simulated.acting import Actor, usage_error
from raytune_autotuner.engine.simulated.cost import kv_cache_blocks, memory, startup_plan
from raytune_autotuner.engine.simulated.fate import fate, leaks, uneven
from raytune_autotuner.engine.simulated.faults import Effect, Fault, parse_faults
from raytune_autotuner.engine.simulated.ranks import Followers, Head
from raytune_autotuner.engine.simulated.setting import Hardware, Setting
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Stage

_SHARDS = 2
_GRAPH_STEPS = 4


@dataclass(frozen=True)
class Options:
    """The command line, read."""

    host: str
    port: int
    model: str
    served_names: tuple[str, ...]
    setting: Setting
    hardware: Hardware
    seed: int
    faults: tuple[Fault, ...]
    non_default: dict[str, object]
    nodes: int
    rank: int
    meeting: tuple[str, int]
    """Host and port on which rank 0 awaits the others."""
    headless: bool


def parser() -> argparse.ArgumentParser:
    """The server's flags: vLLM's names for the setting, `--fault` and the hardware's sizes beside them."""
    made = argparse.ArgumentParser(prog="api_server.py", description=__doc__, allow_abbrev=False)
    made.add_argument("--host", default="127.0.0.1")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument("--model", required=True, help="any name; nothing is loaded")
    made.add_argument("--served-model-name", nargs="+", help="the names that requests may carry")
    made.add_argument("--seed", type=int, help="of the noise; drawn anew at each start where it is left out")
    made.add_argument("--fault", action="append", default=[], metavar="EFFECT@STAGE:option=value")
    nodes = made.add_argument_group("several nodes")
    nodes.add_argument("--nnodes", type=int, default=1)
    nodes.add_argument("--node-rank", type=int, default=0)
    nodes.add_argument("--master-addr", default="127.0.0.1", help="of rank 0, which awaits the others there")
    nodes.add_argument("--master-port", type=int, default=29501)
    nodes.add_argument("--headless", action="store_true", help="follow rank 0 and serve nothing")
    Setting.add_flags(made.add_argument_group("engine"))
    Hardware.add_flags(made.add_argument_group("hardware"))
    return made


def read_options(argv: Sequence[str]) -> Options:
    """The options of a command line; exits with code 2 for a wrong one, as an argument parser does."""
    made = parser()
    given = made.parse_args(argv)
    values = {name.replace("_", "-"): value for name, value in vars(given).items()}
    try:
        faults = parse_faults(given.fault)
    except ConfigError as error:
        made.error(str(error))
    setting, hardware = Setting.from_params(values), Hardware.from_params(values)
    seed = int.from_bytes(os.urandom(4), "big") if given.seed is None else given.seed
    faults = tuple(fault for fault in faults if fault.rank == given.node_rank)
    if (own := uneven(setting, given.nnodes) or fate(setting, hardware)) is not None and not given.headless:
        faults += (own,)
    if leaks(setting):
        faults += (Fault(Effect.LEAK, Stage.READY, tree="+".join(["setsid"] * (setting.api_server_count - 1))),)
    changed = {n: v for n, v in vars(given).items() if v != made.get_default(n)} | {"seed": seed}
    names = tuple(given.served_model_name or [given.model])
    place = (given.nnodes, given.node_rank, (given.master_addr, given.master_port), given.headless)
    return Options(given.host, given.port, given.model, names, setting, hardware, seed, faults, changed, *place)


class Startup:
    """One start, up to the socket that the server will listen on, and to the other ranks where there are some."""

    def __init__(self, options: Options, actor: Actor) -> None:
        self._options = options
        self._actor = actor
        self._seconds = dict(startup_plan(options.setting, options.hardware))
        self.followers = Followers()
        self.head: Head | None = None

    def run(self) -> socket.socket | None:
        """Go through all stages before `ready`; faults may end the process on the way. None for a headless rank."""
        sock = self._configure()
        for stage, tell in _STAGES.items():
            if stage in self._seconds:
                tell(self, self._seconds[stage])
        self.followers.await_ready()
        return sock

    def _configure(self) -> socket.socket | None:
        options = self._options
        for fault in options.faults:
            if fault.stage is Stage.ARGUMENTS and fault.effect is Effect.REFUSE:
                usage_error(fault, parser().format_usage())
        self._actor.reach(Stage.ARGUMENTS)
        log.say(log.API, f"version {log.VERSION}, model {options.model}")
        log.say(log.API, f"non-default args: {options.non_default}")
        sock = None if options.headless else bind(options.host, options.port)
        log.say(log.API, "Resolved architecture: LlamaForCausalLM")
        self._pause(self._seconds[Stage.CONFIGURATION])
        self._actor.reach(Stage.CONFIGURATION)
        log.say(log.API, f"Using max model len {options.setting.max_model_len}")
        return sock

    def _initialize(self, seconds: float) -> None:
        config = f"model='{self._options.model}', seed={self._options.seed}"
        log.say(log.CORE, f"Initializing a V1 LLM engine (v{log.VERSION}) with config: {config}")
        self._meet()
        self._pause(seconds)
        self._actor.reach(Stage.INITIALIZATION)

    def _meet(self) -> None:
        """Wait for the other ranks, on rank 0 for all of them."""
        if self._options.headless:
            self.head = Head(self._options.meeting)
        elif self._options.nodes > 1:
            self.followers = Followers(self._options.meeting, self._options.nodes - 1)

    def _load_weights(self, seconds: float) -> None:
        log.say(log.WORKER, f"Starting to load model {self._options.model}...")
        self._shards_loaded(0)
        for count in range(1, _SHARDS + 1):
            self._pause(seconds / _SHARDS)
            self._shards_loaded(count)
            if count == 1:
                self._actor.reach(Stage.WEIGHTS)
        log.say(log.WORKER, f"Loading weights took {seconds:.2f} seconds")
        held = memory(self._options.setting, self._options.hardware).weights_gib
        log.say(log.WORKER, f"Model loading took {held:.2f} GiB memory and {seconds:.6f} seconds")

    def _shards_loaded(self, count: int) -> None:
        share = f"{100 * count // _SHARDS:3d}% Completed | {count}/{_SHARDS}"
        log.put(f"Loading safetensors checkpoint shards: {share} [00:00<00:00, 99.00it/s]")

    def _compile(self, seconds: float) -> None:
        log.say(log.WORKER, "Using cache directory: none for vLLM's torch.compile")
        self._pause(seconds)
        self._actor.reach(Stage.COMPILATION)
        log.say(log.WORKER, f"torch.compile takes {seconds:.2f} s in total")

    def _make_kv_cache(self, seconds: float) -> None:
        setting, hardware = self._options.setting, self._options.hardware
        log.say(log.WORKER, f"Available KV cache memory: {memory(setting, hardware).kv_cache_gib:.2f} GiB")
        self._pause(seconds)
        self._actor.reach(Stage.KV_CACHE)
        tokens = kv_cache_blocks(setting, hardware) * setting.block_size
        log.say(log.CORE, f"GPU KV cache size: {tokens:,} tokens")
        concurrency = tokens / setting.max_model_len
        log.say(log.CORE, f"Maximum concurrency for {setting.max_model_len:,} tokens per request: {concurrency:.2f}x")

    def _capture_graphs(self, seconds: float) -> None:
        for step in range(_GRAPH_STEPS):
            self._graphs_captured(step)
            if step == _GRAPH_STEPS // 2:
                self._actor.reach(Stage.GRAPH_CAPTURE)
            self._pause(seconds / _GRAPH_STEPS)
        self._graphs_captured(_GRAPH_STEPS)
        held = memory(self._options.setting, self._options.hardware).graphs_gib
        log.say(log.WORKER, f"Graph capturing finished in {seconds:.0f} secs, took {held:.2f} GiB")

    def _graphs_captured(self, count: int) -> None:
        share = f"{100 * count // _GRAPH_STEPS:3d}%| {count}/{_GRAPH_STEPS}"
        log.put(f"Capturing CUDA graphs (decode, FULL): {share} [00:00<00:00, 50.00it/s]")

    def _pause(self, seconds: float) -> None:
        if seconds > 0:
            time.sleep(seconds)


_STAGES: dict[Stage, Callable[[Startup, float], None]] = {
    Stage.INITIALIZATION: Startup._initialize,
    Stage.WEIGHTS: Startup._load_weights,
    Stage.COMPILATION: Startup._compile,
    Stage.KV_CACHE: Startup._make_kv_cache,
    Stage.GRAPH_CAPTURE: Startup._capture_graphs,
}


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address but not listening yet; exits where the port is taken."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        address_refused(error)
    return sock


def address_refused(error: OSError) -> None:
    """End as a server does that cannot have its address."""
    log.api_failed(f"OSError: {error}")
    raise SystemExit(1)
