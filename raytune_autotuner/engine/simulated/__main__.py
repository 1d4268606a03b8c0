"""`python -m raytune_autotuner.engine.simulated`: the simulated engine as a process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from raytune_autotuner.engine.simulated import log
from raytune_autotuner.engine.simulated.acting import Actor
from raytune_autotuner.engine.simulated.startup import Startup, read_options
from raytune_autotuner.study.failure import Stage


def main(argv: Sequence[str]) -> None:
    """Start, serve, stop; exits with vLLM's codes."""
    options = read_options(argv)
    actor = Actor(options.faults)
    startup = Startup(options, actor)
    sock = startup.run()
    if sock is None:
        follow(startup, actor)
        return
    # Imported late: a start that fails before should not pay for it.
    from raytune_autotuner.engine.simulated.server import serve

    asyncio.run(serve(options, actor, sock, startup.followers))


def follow(startup: Startup, actor: Actor) -> None:
    """Be a rank without a server for as long as rank 0 lives."""
    actor.reach(Stage.READY)
    if startup.head is not None:
        startup.head.follow(actor.request)
    log.say(log.WORKER, "rank 0 is gone")


if __name__ == "__main__":
    main(sys.argv[1:])
