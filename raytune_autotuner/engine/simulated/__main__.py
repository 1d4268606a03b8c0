"""`python -m raytune_autotuner.engine.simulated`: the simulated engine as a process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from raytune_autotuner.engine.simulated.acting import Actor
from raytune_autotuner.engine.simulated.startup import Startup, read_options


def main(argv: Sequence[str]) -> None:
    """Start, serve, stop; exits with vLLM's codes."""
    options = read_options(argv)
    actor = Actor(options.faults)
    sock = Startup(options, actor).run()
    # Imported late: a start that fails before should not pay for it.
    from raytune_autotuner.engine.simulated.server import serve

    asyncio.run(serve(options, actor, sock))


if __name__ == "__main__":
    main(sys.argv[1:])
