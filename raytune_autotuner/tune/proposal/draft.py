"""A study proposed for a model on the machines there are: wishes in, a commented study file out.

`propose` is the whole of it and pure, given what was looked at: what fits (`fit`), how long it takes (`pace`, `plan`),
what is worth a search (`parameters`), and how it is written down (`page`). The text is read back as a study and
checked as any other before it is handed out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from raytune_autotuner.engine import models
from raytune_autotuner.report.store import Store
from raytune_autotuner.report.wording import format_duration
from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import EngineSpec, Study
from raytune_autotuner.tune.checks import check_study
from raytune_autotuner.tune.proposal.facts import Model, Site
from raytune_autotuner.tune.proposal.fit import Fit
from raytune_autotuner.tune.proposal.pace import Pace, pace_of
from raytune_autotuner.tune.proposal.page import Comments, write_page
from raytune_autotuner.tune.proposal.parameters import (
    KV_DTYPE,
    QUALITY_TOKENS,
    TENSOR_PARALLEL,
    Parameter,
    constraints,
    first_point,
    ranked,
)
from raytune_autotuner.tune.proposal.plan import Plan, plan_for
from raytune_autotuner.tune.proposal.wishes import Wishes, lengths

# From so many trials on, so many parameters are worth a search.
_PARAMETERS = ((30, 9), (16, 6), (8, 4), (0, 3))
_MAX_NAME = 64


@dataclass(frozen=True)
class Proposal:
    """A study file that is ready to run, and what it rests on."""

    text: str
    study: Study
    plan: Plan
    pace: Pace
    unseen: tuple[str, ...]
    """What could not be looked at."""


def propose(wishes: Wishes, model: Model, site: Site, results: Path | Store) -> Proposal:
    """The study for `wishes`; raises `ConfigError` for wishes that no study on these machines can meet."""
    traffic = wishes.traffic or default_traffic(model, site)
    fit = Fit(model, site, lengths(traffic))
    _ = fit.max_model_len, fit.parallel_sizes  # what cannot be served at all is said first
    pace = pace_of(fit, results)
    plan = plan_for(fit, pace, wishes.limits, wishes.minutes)
    draft = _Draft(wishes, traffic, fit, plan, pace)
    text = write_page(draft.raw, draft.comments, draft.head)
    study = parse_study(yaml.safe_load(text), source="the proposed study")
    check_study(study, results)
    return Proposal(text, study, plan, pace, draft.unseen)


def default_traffic(model: Model, site: Site) -> str:
    """A stand-in for the traffic that nobody told of, no longer than the model takes."""
    small = min(host.cpus for host in site.hosts) < 16
    tokens_in, tokens_out = (1024, 256) if site.on_gpus else (128, 32) if small else (512, 128)
    longest = model.longest or math.inf
    if longest < 2:
        raise ConfigError(f"model: {shown(model.name)} takes {longest} token; it cannot serve text.")
    return f"D({int(max(min(tokens_in, longest // 2), 1))},{int(max(min(tokens_out, longest // 8), 1))})"


@dataclass(frozen=True)
class _Draft:
    """The study as plain values, and the words to it."""

    wishes: Wishes
    traffic: str
    fit: Fit
    plan: Plan
    pace: Pace

    @property
    def raw(self) -> dict[str, Any]:
        quality: dict[str, Any] = {"quality": {}} if KV_DTYPE in self._names else {}
        conditions = constraints(self.fit, self._names)
        return {
            "study": study_name(self.fit.model.name),
            "model": self.fit.model.name,
            "engine": {"kind": "vllm", **self._python, "args": self._args, **self._env},
            "search_space": {parameter.name: parameter.distribution for parameter in self._parameters},
            **({"constraints": conditions} if conditions else {}),
            "workload": self._workload,
            "objective": self._objective,
            **quality,
            "search": self._search,
            "verify": {"top": self.plan.top, "restarts": self.plan.restarts},
            "trial": {"timeout_s": self._timeout_s, "hung_after_s": 1800 if self._to_fetch else 300},
            "resources": self._resources,
            **({"ray": {"address": self.fit.site.address}} if self.fit.site.address else {}),
        }

    @cached_property
    def _parameters(self) -> list[Parameter]:
        count = next(count for least, count in _PARAMETERS if self.plan.trials >= least)
        return self._ranked[:count]

    @cached_property
    def _ranked(self) -> list[Parameter]:
        return ranked(self.fit, self.plan.levels, promises=bool(self.wishes.limits))

    @property
    def _names(self) -> list[str]:
        return [parameter.name for parameter in self._parameters]

    @property
    def _python(self) -> dict[str, str]:
        python = EngineSpec(python=self.wishes.python).python
        return {} if python is None else {"python": str(python)}

    @property
    def _args(self) -> dict[str, Any]:
        args: dict[str, Any] = {"max-model-len": self.fit.max_model_len}
        if not self.fit.site.on_gpus:
            args["enforce-eager"] = True
        if self.fit.parallel_sizes[0] > 1:
            args[TENSOR_PARALLEL] = self.fit.parallel_sizes[0]
        return args

    @property
    def _env(self) -> dict[str, Any]:
        return {} if self.fit.site.on_gpus else {"env": {"VLLM_CPU_KVCACHE_SPACE": self.fit.kv_gib}}

    @property
    def _workload(self) -> dict[str, Any]:
        levels = self.plan.levels
        return {
            "traffic": self.traffic,
            "concurrency": list(levels) if len(levels) > 1 else levels[0],
            "requests": self.plan.requests,
        }

    @property
    def _objective(self) -> dict[str, Any]:
        limits = self.wishes.limits
        best = (
            {"minimize": "cost_per_million_tokens"} if self._compares_gpus else {"maximize": "output_throughput_tok_s"}
        )
        return {**best, **({"slo": limits} if limits else {})}

    @property
    def _compares_gpus(self) -> bool:
        """Whether trials hold different numbers of GPUs, so that more of them would nearly always serve more."""
        return self.fit.site.on_gpus and TENSOR_PARALLEL in self._names

    @property
    def _search(self) -> dict[str, Any]:
        minutes, point = self.wishes.minutes, first_point(self._parameters)
        budget = {} if minutes is None else {"time_budget": _duration(minutes)}
        return {"trials": self.plan.trials, **budget, "seed": 1, **({"points": [point]} if point else {})}

    @property
    def _timeout_s(self) -> int:
        """Far above the estimate, which may be wrong by as much."""
        least = 3600 if self._to_fetch else 600 if self.fit.site.on_gpus else 300
        return max(math.ceil(5 * self.plan.trial_s / 60) * 60, least)

    @property
    def _to_fetch(self) -> bool:
        """Whether the first start has to fetch the model."""
        return not self.fit.model.config

    @property
    def _resources(self) -> dict[str, Any]:
        hosts = self.fit.site.hosts
        if self.fit.site.on_gpus:
            cpus = min(host.cpus // max(host.gpus, 1) for host in hosts)
            price = {"price_per_hour": 1.0} if self._compares_gpus else {}
            kind = {"accelerator_type": self.fit.site.accelerator} if self.fit.site.accelerator else {}
            return {"gpus": "auto", "cpus": max(min(cpus, 8), 1), **kind, **price}
        return {"gpus": 0, "cpus": min(host.cpus for host in hosts), "max_concurrent": len(hosts)}

    # --- words ---

    @property
    def head(self) -> list[str]:
        """What the file is, what it rests on, and what to do with it."""
        model = self.fit.model
        size = f"{model.weight_gib:.1f} GiB of weights" if model.weight_gib else "weights of unknown size"
        longest = f", requests of up to {model.longest:,} tokens" if model.longest else ""
        lines = [
            "A study proposed by `python -m raytune_autotuner init`. Read it, change what you know better, and run it:",
            "  python -m raytune_autotuner THIS_FILE         (`check THIS_FILE` explains it and starts nothing)",
            "Every key, with its unit and default, is explained in docs/study-file.md.",
            "",
            f"Model:    {size}{longest}",
            f"Machines: {self.fit.site.shape}; the engine computes on {'GPUs' if self.fit.site.on_gpus else 'CPUs'}",
            f"Time:     about {format_duration(self.plan.seconds)} in all: {self.plan.trials} trials and up to "
            f"{self.plan.verification} restarts of about {self.plan.trial_s:.0f} s each ({self.pace.told})",
        ]
        return lines + [f"Not seen: {text}" for text in self.unseen]

    @property
    def unseen(self) -> tuple[str, ...]:
        """What could not be looked at."""
        return (*self.fit.model.unseen, *self.fit.doubts, *self.fit.site.unseen)

    @property
    def comments(self) -> Comments:
        """The lines above each key."""
        fixed: dict[tuple[str, ...], list[str]] = {
            ("study",): ["Names the results folder: results/<study>-<time>/"],
            ("engine", "python"): ["The Python that has vLLM in it."],
            ("engine", "args"): ["Flags of every trial, the baseline too: vLLM's own names, without the dashes."],
            ("engine", "args", "max-model-len"): self._length_words,
            ("engine", "args", "enforce-eager"): [
                "Skips compilation, which takes minutes on a CPU for each new setting. Trap: it can win in the end; "
                "leave this out once the other settings are found."
            ],
            ("engine", "args", TENSOR_PARALLEL): [
                "The fewest devices that hold the model: the baseline must be able to start."
            ],
            ("engine", "env", "VLLM_CPU_KVCACHE_SPACE"): self._kv_words,
            ("search_space",): self._space_words,
            ("constraints",): ["Settings that break one of these are never started."],
            **self._load_words,
            **self._search_words,
        }
        for parameter in self._parameters:
            here = [f"Here: {parameter.here}."] if parameter.here else []
            fixed["search_space", parameter.name] = [*parameter.why, *here]
        return fixed

    @property
    def _length_words(self) -> list[str]:
        longest = self.fit.model.longest
        more = f", of {longest:,} that the model takes" if longest else ""
        return [
            f"Tokens of prompt and answer: a promise to the users and no setting. This covers the traffic below{more}; "
            "the shorter, the more requests the KV cache holds."
        ]

    @property
    def _kv_words(self) -> list[str]:
        each = self.fit.model.kv_bytes
        why = "a guess, as the model's shape is not known"
        if each is not None:
            tokens = self.fit.request_tokens
            why = f"a token takes {each / 1024:,.0f} KiB, so {self.fit.concurrency} requests of {tokens:,} tokens fit"
        return [
            f"GiB for the KV cache: {why}. Traps: whole numbers only; more than the machine has fails; with tensor "
            "parallelism each worker takes as much."
        ]

    @property
    def _space_words(self) -> list[str]:
        space = "vllm-gpu" if self.fit.site.on_gpus else "vllm-cpu"
        left = [parameter.name for parameter in self._ranked if parameter.name not in self._names]
        lines = ["What is searched. Trial 0, the baseline, leaves all of these at the engine's own defaults."]
        if left:
            lines.append(f"Left out, as there are trials for the first few only: {', '.join(left)}.")
        lines.append(
            "Left out, as it needs a decision: enable-prefix-caching (worth much where prompts begin alike, nothing "
            "with the random ones of this workload: add workload.prefix with it); what changes answers (dtype, "
            "quantization, speculation: add them with `quality: {}`). "
            f"The ready-made space {space} has the rest: docs/spaces.md."
        )
        return lines

    @property
    def _load_words(self) -> dict[tuple[str, ...], list[str]]:
        asked = "as asked for." if self.wishes.traffic else "a stand-in. Put the lengths of your own requests here."
        levels, needed = self.plan.levels, "enough for every percentile that is promised"
        several = "each is measured; the objective is their mean, the promises hold at each" if len(levels) > 1 else ""
        words = {
            ("workload",): ["What every trial is measured under, the same requests for all."],
            ("workload", "traffic"): [f"Tokens of prompt and answer, {asked}"],
            ("workload", "concurrency"): [
                f"Requests in flight{f': {several}' if several else ''}. Trap: a setting that is best at one load need "
                "not be so at another, so write what your service sees."
            ],
            ("workload", "requests"): [f"At each level: several times what is in flight, and {needed}."],
            ("objective",): ["What is optimised, and the promises (SLOs) that the winner must keep at every level."],
        }
        if self._compares_gpus:
            words["objective",].append(
                "Settings on one GPU are compared with those on several, which nearly always give more tokens. So "
                "tokens per GPU count: by their price, where an hour of a GPU costs 1 unless you write yours under "
                "resources. For the most that one server can give: maximize: output_throughput_tok_s"
            )
        if not self.wishes.limits:
            words["objective",].append("None was asked for. With some:  slo: {ttft_ms: {p90: 500}, tpot_ms: {p90: 50}}")
        if KV_DTYPE in self._names:
            words["quality",] = [
                "fp8 is among the choices: answers that get worse than the defaults' are a failure. Needs "
                f"max-model-len of {QUALITY_TOKENS} or more."
            ]
        return words

    @property
    def _search_words(self) -> dict[tuple[str, ...], list[str]]:
        words = {
            ("search", "trials"): ["The baseline included. More of them find more, at first."],
            ("search", "time_budget"): ["No new trial starts after it; time for the verification is kept back."],
            ("search", "points"): ["Tried first, right after the baseline: a good guess."],
            ("verify",): [
                "The best settings and the baseline again, on fresh engine starts, before one is recommended: a single "
                "measurement is too noisy to bet on."
            ],
            ("trial", "timeout_s"): ["From the trial's start; what is not done by then is stopped and graded."],
            ("resources",): self._resource_words,
            ("resources", "accelerator_type"): [
                "The kind of which the cluster has most: scores of different hardware do not compare."
            ],
            ("ray",): ["The cluster that this was made for; the study runs on one of its nodes."],
        }
        if self._to_fetch:
            words["trial", "timeout_s"].append(
                "So long because the first start fetches the model. Fetch it before, and write 10m here and 5m below."
            )
        if self.plan.restarts < 5:
            words["verify",].append("5 restarts find gains of a few per cent, if there is time.")
        return words

    @property
    def _resource_words(self) -> list[str]:
        if self.fit.site.on_gpus:
            return ["A trial holds as many GPUs as its parallel sizes ask for; trials run side by side on the others."]
        return ["A whole machine for each trial: side by side on one, they would measure each other."]


def _duration(minutes: float) -> str:
    """As a study file takes it.

    >>> _duration(90), _duration(7.5)
    ('90m', '450s')
    """
    return f"{minutes:.0f}m" if float(minutes).is_integer() else f"{minutes * 60:.0f}s"


def study_name(model: str) -> str:
    """A name that a study may have, after its model.

    >>> study_name("meta-llama/Llama-3.1-8B-Instruct"), study_name("bundled:smollm2-135m-instruct"), study_name("/#/")
    ('Llama-3.1-8B-Instruct', 'smollm2-135m-instruct', 'study')
    """
    last = model.removeprefix(models.PREFIX).rstrip("/").rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:_MAX_NAME]
    return plain or "study"


def summary(proposal: Proposal, command: str) -> str:
    """For the person who asked: what was proposed and what could not be looked at; `command` runs it."""
    plan = proposal.plan
    lines = [f"could not look at {text}" for text in proposal.unseen]
    lines.append(
        f"proposed: {', '.join(proposal.study.space.by_name)}; {plan.trials} trials and up to {plan.verification} "
        f"restarts, about {format_duration(plan.seconds)} ({proposal.pace.told})"
    )
    return "\n".join([*lines, f"to run it: {command}"])
