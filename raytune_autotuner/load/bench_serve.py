"""Runs the installed vLLM's `bench serve` on given requests. Runs as a script in the engine's own Python.

In on stdin: paths of JSON files, one a line, each
`{"options": [str], "requests": [[prompt, tokens in, tokens out, due in s]], "result": path}`,
where a prompt is text or a list of token ids. Out: the result files, as `bench serve` writes them. The first argument
is the process that it is to end with.

Through its command line, `bench serve` takes neither prompts as token ids nor times at which they are due; the requests
themselves can have both. So its own reader of data sets is replaced, and nothing else of it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Send one load after the other until stdin ends; vLLM is imported once."""
    _die_with(int(sys.argv[1]))
    for path in sys.stdin:
        with open(path.strip(), encoding="utf-8") as file:
            job = json.load(file)
        written = _send(job["options"], job["requests"])
        sys.stdout.flush()
        sys.stderr.flush()
        os.replace(written, job["result"])
    os._exit(0)  # the end of an interpreter that has imported vLLM takes seconds and has nothing to save


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _send(options: list[str], requests: list[list[Any]]) -> str:
    """Send the requests; the path of what was written."""
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    samples = [
        SampleRequest(
            prompt=prompt,
            prompt_len=tokens_in,
            expected_output_len=tokens_out,
            request_overrides={"min_tokens": tokens_out},
            timestamp=due_s,
        )
        for prompt, tokens_in, tokens_out, due_s in requests
    ]
    serve.get_samples = lambda *_: samples
    arguments = parser.parse_args(options)
    serve.main(arguments)
    return str(os.path.join(arguments.result_dir, arguments.result_filename))


if __name__ == "__main__":
    main()
