"""Secrets in text: found by the name that they stand under, by their own look or because they are known; then `***`.

Whatever this package writes to disk or to a terminal goes through here, an engine's output included. Text in, text
out; standard library only. What a process knows as secret are the values of its environment's secret variables, and
what `learn` told it. A secret that somebody has cut in two or encoded is not found.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import quote

MASK = "***"
_SEGMENTS = {"TOKEN", "KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS"}
_MIN_SECRET = 8  # shorter values of secret variables would blank out ordinary words
_HINT = re.compile(r"hf_|sk-|gh[pousr]_|github_|eyJ|AKIA|://|(?i:token|key|secret|passw|credential|bearer|basic )")
"""Nearly every line has none of these, and is passed on as it is."""
_LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{10,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|eyJ[\w-]{8,2000}+\.[\w.-]+|AKIA[0-9A-Z]{12,})\b"
)
_BEARER = re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.~+/=-]{6,}")
_IN_URL = re.compile(r"""(://[^/\s:]*:)(?!\d+@sha256:)([^/\s@]+(?:@[^/\s@"',]+)*)(@)""")
"""User and password may hold @; a port before an image's digest is none."""
_VALUE = r"""(?!"\$\w+")(?:"[^"]*"|'[^']*'|[^\s,;'"}\])]+)"""  # "$NAME" is no secret
# NAME_TOKEN=..., "HF_TOKEN": "...", api_key='...', --api-key ..., '--hf-token', '...'
# Only the end of a name tells: what may stand before it would be tried at each of its letters, in time of their square.
_NAME = (
    r"(?:TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)(?:_[A-Z0-9]+){0,8}+"
    r"|(?i:api[_-]?key)|(?:hf|auth|access|api|bearer|refresh)[_-]token|access[_-]key|secret|passw(?:or)?d"
    r"""|(?<!\w)token(?=["']?\s*=|["']\s*:)"""
)
_NAMED = re.compile(rf"""(?<![A-Za-z0-9])((?:{_NAME})["']?\s*[=:]\s*(?P<list>\[)?){_VALUE}(?(list)(?:,\s*{_VALUE})*)""")
_FLAG = re.compile(rf"""(?<![\w-])(--?[\w-]*(?:token|key|secret|password)(?:["'],\s*|\s+)){_VALUE}""")
_SECRET_FLAG = re.compile(r"--?[\w-]*(?:token|key|secret|password)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_learned: set[str] = set()


class Masked(str):
    """Text that holds no secret any more, and that another masking could only spoil."""

    __slots__ = ()


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret.

    >>> is_secret("HF_TOKEN"), is_secret("TOKENIZERS_PARALLELISM")
    (True, False)
    """
    return not _SEGMENTS.isdisjoint(re.split(r"[_\-:. ]", name.upper()))


def url_passwords(text: str) -> set[str]:
    """The passwords in the URLs of `text`, masked ones left out.

    >>> url_passwords("https://me:pw@host/x")
    {'pw'}
    """
    return {found[2] for found in _IN_URL.finditer(text)} - {MASK}


def looks_secret(text: str) -> bool:
    """Whether `text` holds a token of a known look, or a URL with a password.

    >>> looks_secret("hf_0123456789abcdef"), looks_secret("hf_overrides")
    (True, False)
    """
    return _LOOKS.search(text) is not None or bool(url_passwords(text))


def secrets_in(env: Mapping[str, str]) -> set[str]:
    """What is secret in an environment: the values of secret variables, and passwords in URLs."""
    return {value for name, value in env.items() if is_secret(name)}.union(*map(url_passwords, env.values()))


def learn(secrets: Iterable[str]) -> None:
    """From now on this process masks `secrets` wherever they stand, those of a few characters excepted."""
    _learned.update(secret for secret in secrets if len(secret) >= _MIN_SECRET)
    _known.cache_clear()


def mask(text: str, env: Mapping[str, str] | None = None) -> str:
    """`text` without secrets: known ones, known looks and values beside telling names.

    `env` is this process's environment unless given, as it was at the first call.
    """
    if isinstance(text, Masked):
        return text
    known = _known() if env is None else _pattern(frozenset(secrets_in(env)))
    text = text if known is None else known.sub(MASK, text)
    if not _HINT.search(text):
        return text
    text = _LOOKS.sub(MASK, text)
    text = _BEARER.sub(rf"\g<1>{MASK}", text)
    text = _IN_URL.sub(rf"\g<1>{MASK}\g<3>", text)
    text = _FLAG.sub(_keep_quotes, text)
    return _NAMED.sub(_keep_quotes, text)


@cache
def _known() -> re.Pattern[str] | None:
    return _pattern(frozenset(secrets_in(os.environ) | _learned))


@cache
def _pattern(secrets: frozenset[str]) -> re.Pattern[str] | None:
    """Finds each of `secrets` and of their lines, also as JSON, a URL or a shell writes it; the longest first."""
    parts = {part for secret in secrets for part in (secret, *map(str.strip, secret.splitlines()))}
    forms = {form for part in parts if len(part) >= _MIN_SECRET for form in _forms(part)}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True)))) if forms else None


def _forms(secret: str) -> tuple[str, ...]:
    as_texts = (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], shlex.quote(secret))
    return *as_texts, quote(secret), quote(secret, safe="")


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
        return mask_words(value) if all(isinstance(item, str) for item in value) else [*map(mask_values, value)]
    return mask(value) if isinstance(value, str) else value


def assignment(name: str, value: str) -> str:
    """`NAME=value` as a shell takes it; a secret is taken from the environment of whoever runs it.

    >>> assignment("HF_TOKEN", "hf_0123456789"), assignment("A", "x y")
    ('HF_TOKEN="$HF_TOKEN"', "A='x y'")
    """
    return f'{name}="${name}"' if is_secret(name) else f"{name}={shlex.quote(value)}"


def mask_words(words: Sequence[str]) -> list[str]:
    """A command's arguments without secrets, those included that only the flag before them gives away.

    >>> mask_words(["serve", "--api-key", "x"])
    ['serve', '--api-key', '***']
    """
    pairs = zip(("", *words), words, strict=False)
    return [
        MASK if _SECRET_FLAG.fullmatch(before) and not word.startswith("-") else mask(word) for before, word in pairs
    ]


def mask_line(line: str) -> Masked:
    """A shell line (assignments, then a command) without secrets, which still is one: each word is masked by itself.

    In the line as a whole a masking would take quotes for those of a value, and let out what they hold.

    >>> mask_line("HF_TOKEN=hf_0123456789 vllm serve m")
    'HF_TOKEN="$HF_TOKEN" vllm serve m'
    """
    words = shlex.split(line)
    count = next((i for i, word in enumerate(words) if not _ASSIGNMENT.fullmatch(word)), len(words))
    pairs = (word.partition("=") for word in words[:count])
    set_first = [assignment(name, mask(value)) for name, _, value in pairs]
    return Masked(" ".join([*set_first, *map(shlex.quote, mask_words(words[count:]))]))


def _keep_quotes(match: re.Match[str]) -> str:
    value = match[0][len(match[1]) :]
    quote_mark = value[0] if value[0] in "\"'" else ""
    return f"{match[1]}{quote_mark}{MASK}{quote_mark}"
