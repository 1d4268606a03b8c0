"""How far a setting's numbers are from exact ones, and what that does to the model's words. Pure functions.

Rounding raises the perplexity by a factor, and makes an answer part from the exact one somewhere. Coarser formats only
ever make both worse: where a finer one parts, a coarser one has parted already. No model is behind it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from raytune_autotuner.engine.simulated.setting import Setting

_WORDS = ("the", "engine", "serves", "tokens", "one", "by", "one", "and", "each", "step", "moves", "its", "batch", "on")
_CHARACTERS_PER_TOKEN = 4
_VOCABULARY = 30_000

# (rise of the logarithm of the perplexity, chance per token that an answer parts from the exact one)
_DTYPES = {"float32": (0.0, 0.0), "float16": (0.0001, 0.001), "bfloat16": (0.001, 0.008), "auto": (0.001, 0.008)}
_KV_CACHE_DTYPES = {"auto": (0.0, 0.0), "fp8": (0.004, 0.01), "fp8_e4m3": (0.004, 0.01), "fp8_e5m2": (0.06, 0.15)}
_QUANTIZATIONS: dict[str | None, tuple[float, float]] = {None: (0.0, 0.0), "fp8": (0.01, 0.015), "awq": (0.02, 0.03)}


def perplexity_rise(setting: Setting) -> float:
    """Logarithm of the factor by which the perplexity is above that of exact numbers."""
    return sum(part[0] for part in _parts(setting))


def parting_chance(setting: Setting) -> float:
    """Chance per token that an answer parts from the exact one, given that it has not yet."""
    return 1.0 - math.prod(1.0 - part[1] for part in _parts(setting))


def answer(prompt: str | tuple[int, ...], tokens: int, chance: float) -> Sequence[str]:
    """The texts of an answer's tokens: always the same for a prompt and a `chance` of parting from the exact ones."""
    start = zlib.crc32(repr(prompt).encode())
    parts_at = _first_success(zlib.crc32(b"parting", start), chance)
    exact = [_WORDS[(start + index) % len(_WORDS)] for index in range(tokens)]
    return [f" {word}" if index < parts_at else f" {word[::-1]}" for index, word in enumerate(exact)]


def prompt_tokens(prompt: str | tuple[int, ...]) -> tuple[int, ...]:
    """The prompt's token ids: its own, or one for each four characters of text."""
    if isinstance(prompt, tuple):
        return prompt
    starts = range(0, len(prompt), _CHARACTERS_PER_TOKEN)
    return tuple(zlib.crc32(prompt[at : at + _CHARACTERS_PER_TOKEN].encode()) % _VOCABULARY for at in starts)


def log_probabilities(tokens: Sequence[int], rise: float) -> list[float]:
    """Natural log-probabilities of a prompt's tokens but the first, each lower by `rise` than with exact numbers."""
    return [-0.5 - 4.0 * _share(zlib.crc32(str(token).encode())) - rise for token in tokens[1:]]


def _parts(setting: Setting) -> tuple[tuple[float, float], ...]:
    return (
        _DTYPES[setting.dtype],
        _KV_CACHE_DTYPES[setting.kv_cache_dtype],
        _QUANTIZATIONS[setting.quantization],
    )


def _share(hashed: int) -> float:
    """A number in (0, 1) from a hash of 32 bits."""
    return (hashed + 0.5) / 2**32


def _first_success(hashed: int, chance: float) -> float:
    """How many trials of `chance` fail before the first that succeeds."""
    return math.inf if chance <= 0.0 else math.floor(math.log(_share(hashed)) / math.log1p(-chance))
