"""What an engine makes of a fixed text and fixed prompts: its perplexity, and its greedy answers.

`ask` needs `/v1/completions` with `prompt_logprobs`, as vLLM has it; what the answers are worth is for
`score.quality` to say. Texts and prompts are sent as text, so that the engine begins them as its model wants.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml

from raytune_autotuner.load.client import blocking
from raytune_autotuner.load.connection import Pool
from raytune_autotuner.load.stream import BadAnswer, short
from raytune_autotuner.score.quality import Quality, perplexity
from raytune_autotuner.study.errors import AutotunerError

ANSWER_TOKENS = 32
IMPOSSIBLE = -9999.0
"""vLLM's word for a probability of 0, which JSON has no number for; no model gives one."""
_TEXTS = "quality_texts.yaml"
_CHECK_EVERY_S = 0.5


class QualityUnknown(AutotunerError):
    """The engine's quality could not be asked for; the text says why."""


class _Texts(NamedTuple):
    passages: tuple[str, ...]
    prompts: tuple[str, ...]


@cache
def texts() -> _Texts:
    """The fixed passages, each scored by itself, and the fixed prompts."""
    raw = yaml.safe_load(resources.files(__package__).joinpath(_TEXTS).read_text(encoding="utf-8"))
    return _Texts(tuple(raw["passages"]), tuple(raw["prompts"]))


async def _ask(base_url: str, model: str, *, deadline: float, check: Callable[[], None] | None = None) -> Quality:
    """The quality of the engine at `base_url`; takes some thousand prompt tokens and some hundred output tokens.

    `deadline` is on `time.monotonic()`'s clock. `check` is called twice a second; what it raises is raised here.

    Raises:
        TimeoutError: the deadline came first.
        QualityUnknown: the engine did not answer, or not with what was asked for, or with no finite number.
    """
    async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
        asking = asyncio.create_task(_Asking(Pool(base_url), model).run())
        try:
            while not (await asyncio.wait({asking}, timeout=_CHECK_EVERY_S))[0]:
                if check:
                    check()
            return asking.result()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


ask = blocking(_ask)


class _Asking:
    """One engine's questions."""

    def __init__(self, pool: Pool, model: str) -> None:
        self._pool = pool
        self._model = model

    async def run(self) -> Quality:
        try:
            # One passage at a time: an engine holds the log-probabilities of all words for each of its tokens.
            scored = [value for passage in texts().passages for value in await self._score(passage)]
            answers = await self._answers()
        finally:
            await self._pool.close()
        return Quality(perplexity(scored), tuple(answers))

    async def _answers(self) -> list[str]:
        """All at once; where one cannot be had, none is waited for, and no connection is opened any more."""
        asked = [asyncio.create_task(self._answer(prompt)) for prompt in texts().prompts]
        try:
            return await asyncio.gather(*asked)
        finally:
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _score(self, passage: str) -> list[float]:
        return log_probabilities(await self._complete(prompt=passage, max_tokens=1, prompt_logprobs=0))

    async def _answer(self, prompt: str) -> str:
        return answer_text(await self._complete(prompt=prompt, max_tokens=ANSWER_TOKENS))

    async def _complete(self, **asked: Any) -> Any:
        """The answer to one request, as JSON; raises `QualityUnknown`."""
        body = json.dumps({"model": self._model, "temperature": 0, **asked}).encode()
        pieces: list[bytes] = []
        try:
            connection = await self._pool.connection()
            try:
                await connection.ask(self._pool.request("/v1/completions", body), lambda piece, _: pieces.append(piece))
            finally:
                self._pool.give_back(connection)
            return json.loads(b"".join(pieces))
        except (OSError, BadAnswer, ValueError) as error:
            asked_for = "prompt log-probabilities" if "prompt_logprobs" in asked else "a greedy answer"
            raise QualityUnknown(f"asked for {asked_for}, the engine gave none: {_line(error)}") from error


def log_probabilities(body: Any) -> list[float]:
    """The natural log-probabilities of a prompt's tokens but the first, which has none; raises `QualityUnknown`."""
    found = _choice(body).get("prompt_logprobs")
    if not isinstance(found, list) or len(found) < 2:
        raise QualityUnknown("the engine gives no log-probabilities of a prompt's tokens (`prompt_logprobs`)")
    values = [_log_probability(entry) for entry in found[1:]]
    for place, value in enumerate(values, start=1):
        if not (math.isfinite(value) and value > IMPOSSIBLE):
            raise QualityUnknown(f"the engine gives token {place} of a fixed text a log-probability of {value}")
    return values


def answer_text(body: Any) -> str:
    """The text of a completion; raises `QualityUnknown`."""
    text = _choice(body).get("text")
    if not isinstance(text, str):
        raise QualityUnknown(f"the engine's answer has no text: {short(str(body))}")
    return text


def _choice(body: Any) -> Mapping[str, Any]:
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not (isinstance(choices, list) and choices and isinstance(choices[0], Mapping)):
        raise QualityUnknown(f"the engine's answer is no completion: {short(str(body))}")
    return choices[0]


def _log_probability(entry: Any) -> float:
    """Of the prompt's own token: the first of an entry, before those that the engine would have preferred."""
    first = next(iter(entry.values()), None) if isinstance(entry, Mapping) else None
    value = first.get("logprob") if isinstance(first, Mapping) else None
    if not isinstance(value, (int, float)):
        raise QualityUnknown(f"the engine leaves out the log-probability of a prompt's token: {short(str(entry))}")
    return float(value)


def _line(error: Exception) -> str:
    return short(f"{error}" if isinstance(error, BadAnswer) else f"{type(error).__name__}: {error}")
