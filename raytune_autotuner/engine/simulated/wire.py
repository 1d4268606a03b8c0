"""vLLM's wire form of completions and chat completions: requests read, answers written. No I/O."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_CHARACTERS_PER_TOKEN = 4
_MAX_LOGPROBS = 20
_DEFAULT_TOKENS = {"completion": 16, "chat": 64}
DONE = b"data: [DONE]\n\n"


class BadRequest(Exception):
    """A request that the server refuses; `status` is its HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, read."""

    chat: bool
    model: str
    prompt: str | tuple[int, ...]
    max_tokens: int
    stream: bool
    include_usage: bool
    prompt_logprobs: bool = False
    """Whether the log-probabilities of the prompt's tokens are wanted."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt: exact for token ids, a quarter of the characters for text."""
        if isinstance(self.prompt, tuple):
            return len(self.prompt)
        return max(-(-len(self.prompt) // _CHARACTERS_PER_TOKEN), 1)

    def prefix(self, block_size: int) -> tuple[int, ...]:
        """A hash for each full block of the prompt, each covering all before it."""
        width = block_size * (1 if isinstance(self.prompt, tuple) else _CHARACTERS_PER_TOKEN)
        chain, last = [], 0
        for end in range(width, len(self.prompt) + 1, width):
            last = hash((last, self.prompt[end - width : end]))
            chain.append(last)
        return tuple(chain)


def read(body: Mapping[str, Any], chat: bool, served: Sequence[str], max_model_len: int) -> Ask:
    """The request in `body`; raises `BadRequest` with the words for the client."""
    model = body.get("model") or served[0]
    if model not in served:
        raise BadRequest(f"The model `{model}` does not exist.", 404)
    prompt = _messages(body) if chat else _prompt(body.get("prompt"))
    default = _DEFAULT_TOKENS["chat" if chat else "completion"]
    tokens = body.get("max_completion_tokens") or body.get("max_tokens", default)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise BadRequest(f"max_tokens must be at least 1, got {tokens}.")
    stream = bool(body.get("stream", False))
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    ask = Ask(chat, model, prompt, tokens, stream, usage, _wants_logprobs(body.get("prompt_logprobs")))
    if ask.prompt_tokens + tokens > max_model_len:
        raise BadRequest(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {tokens} output "
            f"tokens and your prompt contains {ask.prompt_tokens} input tokens."
        )
    return ask


def _prompt(prompt: Any) -> str | tuple[int, ...]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return tuple(prompt)
    raise BadRequest("prompt must be one non-empty text or one non-empty list of token ids.")


def _messages(body: Mapping[str, Any]) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a non-empty list.")
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


def _wants_logprobs(count: Any) -> bool:
    if count is not None and (type(count) is not int or not 0 <= count <= _MAX_LOGPROBS):
        raise BadRequest(f"prompt_logprobs must be an integer from 0 to {_MAX_LOGPROBS}, got {count}.")
    return count is not None


def prompt_logprobs(tokens: Sequence[int], values: Sequence[float]) -> list[dict[str, Any] | None]:
    """The log-probabilities of a prompt's tokens: nothing for the first, then each token's own."""
    entries = zip(tokens[1:], values, strict=True)
    return [None, *({str(t): {"logprob": v, "rank": 1, "decoded_token": f"<{t}>"}} for t, v in entries)]


class Answer:
    """The chunks and bodies that answer one request."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._kind = "chat.completion" if ask.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": self._kind,
            "created": int(time.time()),
            "model": ask.model,
        }
        chunk_head = {**self._head, "object": "chat.completion.chunk" if ask.chat else "text_completion"}
        self._chunk_head = json.dumps(chunk_head, separators=(",", ":"))[:-1]

    def opening(self) -> bytes:
        """What a chat stream sends before its first token; empty for completions."""
        if not self._ask.chat:
            return b""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self._chunk([choice])

    def token(self, text: str, finish_reason: str | None) -> bytes:
        """The chunk of one token."""
        finish = "null" if finish_reason is None else f'"{finish_reason}"'
        if self._ask.chat:
            stop = "" if finish_reason is None else ',"stop_reason":null'
            choice = f'"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":{finish}{stop},"token_ids":null'
        else:
            choice = (
                f'"text":"{text}","logprobs":null,"finish_reason":{finish},"stop_reason":null,'
                '"prompt_token_ids":null,"token_ids":null'
            )
        return f'data: {self._chunk_head},"choices":[{{"index":0,{choice}}}]}}\n\n'.encode()

    def usage_chunk(self, produced: int) -> bytes:
        """The chunk with the token counts, after all others."""
        return self._chunk([], usage=self._usage(produced))

    def body(
        self, words: Sequence[str], finish_reason: str, prompt_logprobs: Sequence[object] | None = None
    ) -> dict[str, Any]:
        """The whole answer at once."""
        text = "".join(words)
        end = {"logprobs": None, "finish_reason": finish_reason, "stop_reason": None, "token_ids": None}
        if self._ask.chat:
            choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, **end}
        else:
            choice = {"index": 0, "text": text, **end, "prompt_logprobs": prompt_logprobs, "prompt_token_ids": None}
        return {**self._head, "choices": [choice], "usage": self._usage(len(words))}

    def _usage(self, produced: int) -> dict[str, int]:
        prompt = self._ask.prompt_tokens
        return {"prompt_tokens": prompt, "total_tokens": prompt + produced, "completion_tokens": produced}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        rest = json.dumps({"choices": choices, **more}, separators=(",", ":"))[1:]
        return f"data: {self._chunk_head},{rest}\n\n".encode()


def error_body(message: str, status: int) -> dict[str, Any]:
    """vLLM's body for an error."""
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
