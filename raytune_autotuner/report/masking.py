"""Secrets in text: found by the name that they stand under, or by their own look, and replaced by `***`.

Whatever this package writes to disk or to a terminal goes through here. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

MASK = "***"
_SEGMENTS = {"TOKEN", "KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS"}
_MIN_SECRET = 8  # shorter values of secret variables would blank out ordinary words
_HINT = re.compile(r"hf_|sk-|gh[pousr]_|AKIA|://|(?i:token|key|secret|passw|credential|bearer)")
"""Nearly every line has none of these, and is passed on as it is."""
_LOOKS = re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16})\b")
_BEARER = re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{6,}")
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^/\s:@]*:)[^/\s@]+(@)")
# NAME_TOKEN=..., "HF_TOKEN": "...", api_key='...', --api-key ...
_NAME = (
    r"(?:[A-Z0-9]+_)*(?:TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)(?:_[A-Z0-9]+)*"
    r"|(?:\w+[_-])?(?:api[_-]?key|(?:hf|auth|access|api|bearer|refresh)[_-]token|access[_-]key|secret|passw(?:or)?d)"
)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s,;'"}\])]+)"""
_NAMED = re.compile(rf"""(?<![A-Za-z0-9])((?:{_NAME})["']?(?:\s*[=:]\s*|(?<=-key)\s+)\[?){_VALUE}""")
_SHELL = re.compile(rf"(?<![\w$])([A-Z_][A-Z0-9_]*)={_VALUE}")


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret.

    >>> is_secret("HF_TOKEN"), is_secret("TOKENIZERS_PARALLELISM")
    (True, False)
    """
    return not _SEGMENTS.isdisjoint(re.split(r"[_\-:. ]", name.upper()))


def mask(text: str, env: Mapping[str, str] | None = None) -> str:
    """`text` without secrets: known looks, values beside telling names, and the values of secret variables in `env`.

    `env` is this process's environment unless given, as it was at the first call.
    """
    for value in _own_secrets() if env is None else _secrets(env):
        text = text.replace(value, MASK)
    if not _HINT.search(text):
        return text
    text = _LOOKS.sub(MASK, text)
    text = _BEARER.sub(rf"\g<1>{MASK}", text)
    text = _IN_URL.sub(rf"\g<1>{MASK}\g<2>", text)
    return _NAMED.sub(_keep_quotes, text)


def _secrets(env: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(value for name, value in env.items() if len(value) >= _MIN_SECRET and is_secret(name))


@cache
def _own_secrets() -> tuple[str, ...]:
    return _secrets(os.environ)


def mask_values(value: Any) -> Any:
    """JSON-like `value` with every secret replaced, also those that only their key gives away."""
    if value is None or isinstance(value, (int, float)):  # most are, and asking for a Mapping takes ten times as long
        return value
    if isinstance(value, Mapping):
        return {
            key: MASK if isinstance(item, str) and is_secret(str(key)) else mask_values(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [mask_values(item) for item in value]
    return mask(value) if isinstance(value, str) else value


def mask_launch(line: str) -> str:
    """A shell line in which a secret variable is taken from the environment of whoever runs it.

    >>> mask_launch("HF_TOKEN=hf_0123456789 vllm serve m")
    'HF_TOKEN="$HF_TOKEN" vllm serve m'
    """

    def from_environment(match: re.Match[str]) -> str:
        name = match[1]
        return f'{name}="${name}"' if is_secret(name) else match[0]

    parts = re.split(r'(\b[A-Z0-9_]+="\$[A-Z0-9_]+")', _SHELL.sub(from_environment, line))
    return "".join(part if index % 2 else mask(part) for index, part in enumerate(parts))


def _keep_quotes(match: re.Match[str]) -> str:
    value = match[0][len(match[1]) :]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{match[1]}{quote}{MASK}{quote}"
