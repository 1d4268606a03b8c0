"""How a request is put to a server: which of OpenAI's endpoints, token ids or text, and which fields its body has.

Not every server takes token ids, and some refuse a field that they do not know. What they all must have is a streamed
answer with the server's own count of tokens in it. It sends nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raytune_autotuner.load.words import as_text
from raytune_autotuner.load.workload import Request
from raytune_autotuner.study.study import EngineSpec


@dataclass(frozen=True)
class Dialect:
    """`completions` with token ids, unless something else is said."""

    api: Literal["completions", "completions-text", "chat"] = "completions"
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Over the usual fields of a body; None leaves one out."""
    exact: bool = True
    """Whether an answer must have all the tokens that were asked for; else it may have fewer."""

    @classmethod
    def of(cls, engine: EngineSpec) -> Dialect:
        """As the study says."""
        return cls(engine.api, engine.request, engine.exact_lengths)

    @property
    def path(self) -> str:
        """The endpoint."""
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    def body(self, model: str, request: Request) -> bytes:
        """A streamed request, greedy and of a fixed length as far as the server lets it be."""
        usual = {
            "model": model,
            **self._asked(request),
            "max_tokens": request.tokens_out,
            "min_tokens": request.tokens_out,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = {name: value for name, value in {**usual, **self.fields}.items() if value is not None}
        return json.dumps(body, separators=(",", ":")).encode()

    def tokens_sent(self, request: Request) -> int:
        """Prompt tokens that the server must have read at the least; 0 where only it can know."""
        return len(request.prompt) if self.api == "completions" and self.exact and type(request.prompt) is list else 0

    def _asked(self, request: Request) -> dict[str, Any]:
        if self.api == "completions":
            return {"prompt": request.prompt}
        text = request.prompt if isinstance(request.prompt, str) else as_text(request.prompt)
        return {"prompt": text} if self.api == "completions-text" else {"messages": [{"role": "user", "content": text}]}
