"""An answer as a stream of tokens: server-sent events in, arrival times and the server's own counts out.

Bytes only: it knows no sockets, no HTTP and no clock.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from raytune_autotuner.study.errors import AutotunerError

_MAX_EVENT_BYTES = 2**20
_MAX_ERROR_CHARS = 200
_MAX_COUNT = 2**63
_FIELDS = (b"data:", b"event:", b"id:", b"retry:")
"""Of an event; one without data says nothing of tokens, such as a ping."""


class BadAnswer(AutotunerError):
    """The server answered something else than a stream of tokens; the text says what."""


class TokenStream:
    """Reads an answer's server-sent events: when tokens arrived, and the server's own counts.

    Cheap per token: an event with text in it is known by its bytes and not parsed. That is safe, since a quote inside
    JSON text is escaped, so that the marker cannot be part of what the model said. All other events are parsed.
    """

    __slots__ = ("_rest", "done", "times_s", "tokens_in", "tokens_out")

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.tokens_in: int | None = None
        self.tokens_out: int | None = None
        self.done = False
        self._rest = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """Take in bytes as they came from the socket, cut anywhere; raises `BadAnswer`."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            if _is_plain_token(event):
                self.times_s.append(now_s)
            else:
                self._parse(event, now_s)
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise BadAnswer(f"no event in {len(self._rest):,} bytes: {short(self._rest)}")

    def close(self, tokens_wanted: int, exact: bool = True, tokens_sent: int = 0) -> None:
        """The answer has ended: raises `BadAnswer` where it is not a full one, or not `exact`, too long a one.

        Nor is one to fewer prompt tokens than `tokens_sent`, where the server counts them.
        """
        if self._rest.strip():
            raise BadAnswer(f"answer cut short after {short(self._rest)!r}")
        if self.tokens_out is None:
            raise BadAnswer(f"answer cut short: no usage after {len(self.times_s)} chunks")
        if self.tokens_out != tokens_wanted and (exact or not 0 < self.tokens_out < tokens_wanted):
            raise BadAnswer(f"{tokens_wanted} output tokens wanted, {self.tokens_out} answered")
        if self.tokens_in is not None and self.tokens_in < tokens_sent:
            raise BadAnswer(f"prompt cut short: {tokens_sent} tokens sent, {self.tokens_in} read")
        if not self.times_s:
            raise BadAnswer("no token arrived")

    def _parse(self, event: bytes, now_s: float) -> None:
        lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
        data = b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
        if data == b"[DONE]":
            self.done = True
        elif data:
            self._take(data, now_s)
        elif not all(line.startswith(_FIELDS) for line in lines):
            raise BadAnswer(f"not an event: {short(event)!r}")

    def _take(self, data: bytes, now_s: float) -> None:
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadAnswer(f"not JSON: {short(data)!r}") from error
        if not isinstance(chunk, dict):
            raise BadAnswer(f"not a chunk: {short(data)!r}")
        if chunk.get("error"):
            raise BadAnswer(f"error in the stream: {_message(chunk)}")
        told = _told(chunk)
        if told is None:
            raise BadAnswer(f"not a chunk: {short(data)!r}")
        if _brings_token(told, beside_usage=isinstance(chunk.get("usage"), dict)):
            self.times_s.append(now_s)
        if isinstance(usage := chunk.get("usage"), dict):
            self.tokens_in, self.tokens_out = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
            if self.tokens_out and not self.times_s and chunk.get("choices"):  # of tokens that make no text
                self.times_s.append(now_s)


def _is_plain_token(event: bytes) -> bool:
    if b'"role":' in event:  # the opening of a chat
        return False
    if b'"choices":[{' in event:
        return b'"usage":{' not in event
    return b'"choices": [{' in event and b'"usage": {' not in event


def _told(chunk: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What each choice of a chunk tells; None where that is no chunk of an answer."""
    choices = chunk.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        return None
    told = [choice.get("delta") or {"text": choice.get("text")} for choice in choices]
    return told if all(isinstance(part, dict) for part in told) else None


def _brings_token(told: list[dict[str, Any]], beside_usage: bool) -> bool:
    """Whether a token has come: not with the opening of a chat, nor with a usage beside a choice without text.

    The closing of a chat, a choice with nothing but the reason, counts as one, as it does for vLLM's `bench serve`:
    some servers send the last token with it.
    """
    may_be_empty = beside_usage or any("role" in part for part in told)
    return bool(told) and (not may_be_empty or any(part[name] for part in told for name in part if name != "role"))


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and 0 <= value < _MAX_COUNT else None


def message_in(body: bytes) -> str:
    """What a refusal says: the error message in its JSON, else its text."""
    with suppress(ValueError, RecursionError):
        parsed = json.loads(body)
        if isinstance(parsed, dict):
            return _message(parsed)
    return short(body)


def _message(chunk: dict[str, Any]) -> str:
    error = chunk.get("error", chunk)
    return short(str(error.get("message", error) if isinstance(error, dict) else error))


def short(text: bytes | str) -> str:
    """One line of at most 200 characters, which can be written as UTF-8: JSON may hold half a character."""
    shown = text[: 4 * _MAX_ERROR_CHARS].decode(errors="replace") if isinstance(text, bytes) else text
    return " ".join(shown.split())[:_MAX_ERROR_CHARS].encode(errors="replace").decode()
