"""The simulated engine's HTTP server: the scheduler of `model` in real time.

`Core` steps the scheduler and hands out tokens when their time has come; `Api` speaks vLLM's HTTP for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from raytune_autotuner.engine.simulated import fidelity, log, wire
from raytune_autotuner.engine.simulated.acting import Actor
from raytune_autotuner.engine.simulated.faults import Effect, Fault
from raytune_autotuner.engine.simulated.ranks import Followers
from raytune_autotuner.engine.simulated.scheduler import Request, Scheduler
from raytune_autotuner.engine.simulated.startup import Options, address_refused
from raytune_autotuner.study.failure import Stage

_MAX_LAG_S = 0.02
_STATS_EVERY_S = 10.0
_MAX_BODY_BYTES = 256 * 2**20
_SSE = {"Content-Type": "text/event-stream; charset=utf-8"}


class Core:
    """Steps the scheduler in real time; each request has a queue of its tokens."""

    def __init__(self, scheduler: Scheduler, actor: Actor) -> None:
        self.scheduler = scheduler
        self._actor = actor
        self._queues: dict[int, asyncio.Queue[bool]] = {}
        self._work = asyncio.Event()
        self._clock = 0.0

    async def run(self) -> None:
        """Step for ever."""
        while True:
            if self.scheduler.idle:
                self._work.clear()
                await self._work.wait()
                self._clock = time.monotonic()
            if self._actor.engine_hangs:
                await asyncio.Event().wait()
            await self._step()

    async def tokens(self, request: Request) -> AsyncGenerator[bool, None]:
        """Queue a request and yield once for each token, True for the last; aborted when closed early."""
        queue = self._queues[request.id] = asyncio.Queue()
        self.scheduler.add(request)
        self._work.set()
        try:
            last = False
            while not last:
                last = await queue.get()
                yield last
        finally:
            del self._queues[request.id]
            self.scheduler.abort(request.id)

    async def _step(self) -> None:
        step = self.scheduler.step()
        now = time.monotonic()
        self._clock = max(self._clock, now - _MAX_LAG_S) + step.duration_ms / 1000
        await asyncio.sleep(max(self._clock - now, 0.0))
        for request_id in step.tokens:
            if request_id in self._queues:
                self._queues[request_id].put_nowait(request_id in step.finished)


class Api:
    """The HTTP endpoints."""

    def __init__(self, options: Options, core: Core, actor: Actor, followers: Followers) -> None:
        self._options = options
        self._core = core
        self._actor = actor
        self._followers = followers
        self._ids = itertools.count()
        self._finished = 0
        self._parting_chance = fidelity.parting_chance(options.setting)

    def app(self) -> web.Application:
        """The application with all routes."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/reset_prefix_cache", self._reset_prefix_cache)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        app.on_response_prepare.append(_access_line)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": log.VERSION})

    async def _models(self, request: web.Request) -> web.Response:
        length = self._options.setting.max_model_len
        cards = [
            {"id": name, "object": "model", "created": 0, "owned_by": "vllm", "max_model_len": length}
            for name in self._options.served_names
        ]
        return web.json_response({"object": "list", "data": cards})

    async def _reset_prefix_cache(self, request: web.Request) -> web.Response:
        self._core.scheduler.forget_prefixes()
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        text = metrics_text(self._core.scheduler, self._options.served_names[0], self._finished)
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=False)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=True)

    async def _generate(self, request: web.Request, chat: bool) -> web.StreamResponse:
        index = next(self._ids)
        self._followers.step()
        spoiled = self._actor.request(index)
        if spoiled is not None and spoiled.effect is Effect.ERROR500:
            return _error("EngineCore failed on this request.", 500)
        if spoiled is not None and spoiled.effect is Effect.GARBAGE and spoiled.mode != "empty":
            return _rubbish(spoiled)
        try:
            reply = self._reply(index, await _json(request), chat, spoiled)
        except wire.BadRequest as error:
            return _error(str(error), error.status)
        return await self._stream(request, reply) if reply.ask.stream else await self._whole(reply)

    def _reply(self, index: int, body: dict[str, object], chat: bool, spoiled: Fault | None) -> _Reply:
        setting = self._options.setting
        ask = wire.read(body, chat, self._options.served_names, setting.max_model_len)
        words = _spoil(fidelity.answer(ask.prompt, ask.max_tokens, self._parting_chance), spoiled)
        prefix = ask.prefix(setting.block_size) if setting.enable_prefix_caching else ()
        cut = len(words) // 2 if spoiled is not None and spoiled.effect is Effect.DISCONNECT else None
        return _Reply(ask, words, Request(index, ask.prompt_tokens, len(words), prefix), cut)

    async def _whole(self, reply: _Reply) -> web.Response:
        async for _ in self._words(reply):
            pass
        self._finished += 1
        scored = self._prompt_logprobs(reply.ask) if reply.ask.prompt_logprobs else None
        return web.json_response(wire.Answer(reply.ask).body(reply.words, reply.finish_reason, scored))

    def _prompt_logprobs(self, ask: wire.Ask) -> list[dict[str, Any] | None]:
        tokens = fidelity.prompt_tokens(ask.prompt)
        rise = fidelity.perplexity_rise(self._options.setting)
        return wire.prompt_logprobs(tokens, fidelity.log_probabilities(tokens, rise))

    async def _stream(self, request: web.Request, reply: _Reply) -> web.StreamResponse:
        answer, response = wire.Answer(reply.ask), web.StreamResponse(headers=_SSE)
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):
            if opening := answer.opening():
                await response.write(opening)
            async for index, word in self._words(reply):
                if index == reply.cut_at and request.transport is not None:
                    request.transport.abort()
                    return response
                last = index == len(reply.words) - 1
                await response.write(answer.token(word, reply.finish_reason if last else None))
            self._finished += 1
            end = answer.usage_chunk(len(reply.words)) if reply.ask.include_usage else b""
            await response.write_eof(end + wire.DONE)
        return response

    async def _words(self, reply: _Reply) -> AsyncIterator[tuple[int, str]]:
        """Index and text of each token, when its time has come."""
        if not reply.words:
            return
        async with contextlib.aclosing(self._core.tokens(reply.request)) as tokens:
            for index, word in enumerate(reply.words):
                await anext(tokens)
                yield index, word


@dataclass(frozen=True, slots=True)
class _Reply:
    """What will be answered."""

    ask: wire.Ask
    words: Sequence[str]
    request: Request
    cut_at: int | None
    """Index of the token before which the connection is closed."""

    @property
    def finish_reason(self) -> str:
        return "length" if len(self.words) == self.ask.max_tokens else "stop"


def _error(message: str, status: int) -> web.Response:
    return web.json_response(wire.error_body(message, status), status=status)


async def _json(request: web.Request) -> dict[str, object]:
    try:
        body = await request.json()
    except ValueError as error:
        raise wire.BadRequest(f"The body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise wire.BadRequest("The body must be a JSON object.")
    return body


def _spoil(words: Sequence[str], fault: Fault | None) -> Sequence[str]:
    if fault is not None and fault.effect is Effect.GARBAGE:
        return []
    if fault is not None and fault.effect is Effect.CUT_SHORT:
        return words[: int(len(words) * fault.keep)]
    return words


def _rubbish(fault: Fault) -> web.Response:
    if fault.mode == "json":
        return web.json_response({"unexpected": [1, 2, 3]})
    return web.Response(text="<html><body>it works!</body></html>", content_type="text/html")


async def _access_line(request: web.Request, response: web.StreamResponse) -> None:
    peer = request.transport.get_extra_info("peername") if request.transport else None
    host, port = (peer or ("-", 0))[:2]
    line = f'"{request.method} {request.path} HTTP/1.1" {response.status} {response.reason}'
    log.put(f"INFO:     {host}:{port} - {line}")


def metrics_text(scheduler: Scheduler, model: str, finished: int) -> str:
    """The engine's state in Prometheus' text form, under vLLM's names."""
    counters = scheduler.counters
    values = [
        ("num_requests_running", "gauge", len(scheduler.running)),
        ("num_requests_waiting", "gauge", len(scheduler.waiting)),
        ("kv_cache_usage_perc", "gauge", scheduler.kv_cache_usage),
        ("num_preemptions_total", "counter", counters.preemptions),
        ("prompt_tokens_total", "counter", counters.prompt_tokens),
        ("generation_tokens_total", "counter", counters.generation_tokens),
        ("prefix_cache_queries_total", "counter", counters.prefix_queries),
        ("prefix_cache_hits_total", "counter", counters.prefix_hits),
        ("request_success_total", "counter", finished),
    ]
    labels = f'{{engine="0",model_name="{model}"}}'
    lines = []
    for name, kind, value in values:
        lines += [f"# HELP vllm:{name} Simulated.", f"# TYPE vllm:{name} {kind}", f"vllm:{name}{labels} {float(value)}"]
    return "\n".join(lines) + "\n"


async def _print_stats(core: Core) -> None:
    """A line every ten seconds in which there was work."""
    before = (0, 0)
    while True:
        await asyncio.sleep(_STATS_EVERY_S)
        counters = core.scheduler.counters
        now = (counters.prompt_tokens, counters.generation_tokens)
        if now != before:
            log.say(log.API, stats_line(core.scheduler, now[0] - before[0], now[1] - before[1]))
        before = now


def stats_line(scheduler: Scheduler, prompt_tokens: int, generation_tokens: int) -> str:
    """vLLM's periodic line, for the tokens of the last period."""
    return (
        f"Engine 000: Avg prompt throughput: {prompt_tokens / _STATS_EVERY_S:.1f} tokens/s, "
        f"Avg generation throughput: {generation_tokens / _STATS_EVERY_S:.1f} tokens/s, "
        f"Running: {len(scheduler.running)} reqs, Waiting: {len(scheduler.waiting)} reqs, "
        f"GPU KV cache usage: {100 * scheduler.kv_cache_usage:.1f}%"
    )


async def serve(options: Options, actor: Actor, sock: socket.socket, followers: Followers) -> None:
    """Serve on the bound socket until SIGTERM or SIGINT."""
    stop = _stop_event(actor)
    core = Core(Scheduler(options.setting, options.hardware, options.seed), actor)
    tasks = [asyncio.create_task(core.run()), asyncio.create_task(_print_stats(core))]
    app = Api(options, core, actor, followers).app()
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    await _listen(runner, sock, options)
    actor.reach(Stage.READY)
    await stop.wait()
    log.shutting_down()
    for task in tasks:
        task.cancel()
    await runner.cleanup()
    log.shut_down()


async def _listen(runner: web.AppRunner, sock: socket.socket, options: Options) -> None:
    log.say(log.API, f"Starting vLLM server on http://{options.host}:{options.port}")
    log.put(f"INFO:     Started server process [{log.pid()}]", sys.stderr)
    log.put("INFO:     Waiting for application startup.", sys.stderr)
    try:
        await web.SockSite(runner, sock).start()
    except OSError as error:
        address_refused(error)
    log.put("INFO:     Application startup complete.", sys.stderr)


def _stop_event(actor: Actor) -> asyncio.Event:
    """Set by SIGINT and, unless a fault ignores it, by SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    if not actor.ignores_term:
        loop.add_signal_handler(signal.SIGTERM, stop.set)
    return stop
