"""What `init` proposes: for made-up models and machines, each proposal is a study that can run there."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytune_autotuner.engine import memory
from raytune_autotuner.engine.memory import GIB, Weights
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import load_study, parse_study
from raytune_autotuner.study.spaces import FOLDER, explained, shipped
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from raytune_autotuner.tune.checks import check_study
from raytune_autotuner.tune.proposal.draft import Proposal, propose, study_name
from raytune_autotuner.tune.proposal.facts import Host, Model, Site, longest_request, one_kind, size_by_name
from raytune_autotuner.tune.proposal.page import scalar, write_page
from raytune_autotuner.tune.proposal.wishes import Wishes, parse_wishes
from tests.test_memory import DEEPSEEK, LLAMA, MIXTRAL, SMOLLM

LAPTOP = Site((Host(2, (0, 1), 24, (24.0,)),), on_gpus=False)
SOCKETS = Site((Host(96, tuple(range(96)), 768, (384.0, 384.0)),), on_gpus=False)
ONE_GPU = Site((Host(16, tuple(range(16)), 64, (64.0,), gpus=1, gpu_gib=24),), on_gpus=True)
EIGHT_GPUS = Site((Host(128, tuple(range(128)), 1024, (512.0, 512.0), gpus=8, gpu_gib=80),), on_gpus=True)
SITES = {"2 CPUs": LAPTOP, "2 sockets": SOCKETS, "1 GPU": ONE_GPU, "8 GPUs": EIGHT_GPUS}


def model(config: dict[str, Any], longest: int | None = 8192, name: str = "org/name") -> Model:
    return Model(name, config, memory.counted_weights(config), longest)


def proposed(tmp_path: Path, which: Model, site: Site, **wishes: Any) -> Proposal:
    return propose(Wishes(which.name, **wishes), which, site, tmp_path / "results")


def refused(study: Study, which: Model, site: Site) -> list[dict[str, Any]]:
    """Those of the study's settings, its ends in all combinations, that the memory estimate refuses."""
    parameters = study.space.parameters
    names = [parameter.name for parameter in parameters]
    found = []
    for values in itertools.product(*(parameter.bounds for parameter in parameters)):
        setting = study.setting(dict(zip(names, values, strict=True)))
        given = setting.get("env:VLLM_CPU_KVCACHE_SPACE")
        setting["kv-cache-memory-bytes"] = None if given is None else int(given) * GIB
        need = memory.demand(which.config, which.weights, setting)
        size = site.smallest_gpu_gib if site.on_gpus else min(host.memory_gib for host in site.hosts)
        device = None if size is None else size * GIB
        if memory.shortage(need, setting, device, on_cpu=not site.on_gpus) is not None:
            found.append(setting)
    return found


def reject_unless(told: bool, error: ConfigError) -> None:
    """An error that tells its option or key is an answer; any other is a fault."""
    assert told, error


# --- on machines of several kinds ---


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("config", [SMOLLM, LLAMA, MIXTRAL, DEEPSEEK], ids=["135M", "8B", "MoE", "latent"])
def test_every_setting_of_a_proposal_may_fit(tmp_path: Path, site: str, config: dict[str, Any]) -> None:
    which = model(config)
    if config in (MIXTRAL, DEEPSEEK) and site in ("2 CPUs", "1 GPU"):
        with pytest.raises(ConfigError, match="does not fit on 1 machine"):
            proposed(tmp_path, which, SITES[site])
        return
    found = proposed(tmp_path, which, SITES[site])
    (tmp_path / "study.yaml").write_text(found.text)
    study = load_study(tmp_path / "study.yaml")
    assert study == found.study
    assert refused(study, which, SITES[site]) == []
    assert study.search.trials + study.verify.starts in range(10, 41), "where no time is given"
    assert found.plan.seconds < 9 * 3600 or study.search.trials == 4
    for name in study.space.by_name:
        line = next(n for n, text in enumerate(found.text.splitlines()) if text.strip().startswith(f"{name}: "))
        assert found.text.splitlines()[line - 1].lstrip().startswith("# "), f"{name} is not explained"


def test_a_small_cpu_gets_block_sizes_that_have_kernels_its_cores_and_memory_that_it_has(tmp_path: Path) -> None:
    study = proposed(tmp_path, model(SMOLLM), LAPTOP).study
    space = {name: parameter.bounds for name, parameter in study.space.by_name.items()}
    assert space["block-size"] == [32, 64, 128, 256]
    assert space["env:VLLM_CPU_OMP_THREADS_BIND"] == ["auto", "nobind", "0-1"]
    assert space["max-num-seqs"] == [4, 8, 16], "beyond the load it changes nothing"
    assert "tensor-parallel-size" not in space
    assert study.engine.env == {"VLLM_CPU_KVCACHE_SPACE": "1"}
    assert study.engine.args == {"max-model-len": 256, "enforce-eager": True}
    assert study.search.points[0]["env:VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert (study.resources.gpus, study.resources.cpus, study.resources.max_concurrent) == (0, 2, 1)


def test_few_trials_search_what_matters_most(tmp_path: Path) -> None:
    promise = {"tpot_ms": {"p90": 50.0}}
    kept, free = (proposed(tmp_path, model(SMOLLM), LAPTOP, minutes=15, slo=slo).study for slo in (promise, None))
    assert next(iter(kept.space.by_name)) == "max-num-seqs"
    assert "max-num-seqs" not in free.space.by_name, "fewer at once only cost throughput"
    assert "block-size" in free.space.by_name


def test_sockets_may_share_a_model_and_each_gets_a_kv_cache_that_fits(tmp_path: Path) -> None:
    study = proposed(tmp_path, model(LLAMA), SOCKETS).study
    assert study.space.by_name["tensor-parallel-size"].bounds == [1, 2]
    assert 'tensor-parallel-size == 1 or env:VLLM_CPU_OMP_THREADS_BIND == "auto"' in study.constraints
    kv_gib = int(study.engine.env["VLLM_CPU_KVCACHE_SPACE"])
    assert kv_gib * GIB >= 32 * (512 + 128) * 131072
    assert 2 * kv_gib + 15 < 768


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"),
    [(32, 8, [1, 2, 4, 8]), (28, 4, [1, 2, 4]), (9, 3, None), (14, 2, [1, 2]), (40, 10, [1, 2])],
    ids=str,
)
def test_parallel_sizes_divide_the_heads(tmp_path: Path, heads: int, kv_heads: int, sizes: list[int] | None) -> None:
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * 128}
    space = proposed(tmp_path, model(LLAMA | shape), EIGHT_GPUS).study.space.by_name
    assert (space["tensor-parallel-size"].bounds if sizes else None) == sizes
    assert sizes or "tensor-parallel-size" not in space


def test_a_model_for_several_gpus_has_a_baseline_that_can_start(tmp_path: Path) -> None:
    study = proposed(tmp_path, model(MIXTRAL), EIGHT_GPUS).study
    assert study.engine.args["tensor-parallel-size"] == 2, "93 GB of weights"
    assert study.space.by_name["tensor-parallel-size"].bounds == [2, 4, 8]
    assert study.objective.metric == "cost_per_million_tokens", "else more GPUs would nearly always win"


def test_a_full_gpu_gets_fewer_requests_a_larger_share_and_a_smaller_kv_cache_dtype(tmp_path: Path) -> None:
    full = Site((replace(ONE_GPU.hosts[0], gpu_gib=20),), on_gpus=True)
    study = proposed(tmp_path, model(LLAMA), full, traffic="D(4096,512)", minutes=600).study
    assert max(study.workload.concurrency) < 64
    assert study.space.by_name["kv-cache-dtype"].bounds == ["auto", "fp8"]
    assert study.quality is not None, "fp8 may change answers"
    assert study.space.by_name["gpu-memory-utilization"].bounds[0] > 0.8


def test_a_tiny_context_gets_traffic_that_it_takes(tmp_path: Path) -> None:
    study = proposed(tmp_path, model(SMOLLM, longest=64), LAPTOP).study
    assert study.workload.traffic == "D(32,8)"
    assert study.engine.args["max-model-len"] == 64


def test_a_cluster_has_a_trial_a_machine_and_no_cores_by_number(tmp_path: Path) -> None:
    two = Site((LAPTOP.hosts[0], Host(4, (0, 1, 2, 3), 16, (16.0,))), on_gpus=False, address="10.0.0.1:6379")
    study = proposed(tmp_path, model(SMOLLM), two).study
    assert study.ray.address == "10.0.0.1:6379"
    assert study.space.by_name["env:VLLM_CPU_OMP_THREADS_BIND"].bounds == ["auto", "nobind"]
    assert (study.resources.cpus, study.resources.max_concurrent) == (2, 2)


def test_of_several_kinds_of_gpus_one_is_taken(tmp_path: Path) -> None:
    gpu = ONE_GPU.hosts[0]
    few, many = replace(gpu, accelerator="H100"), replace(gpu, gpus=2, accelerator="L4")
    assert one_kind([few, many, LAPTOP.hosts[0]]) == ([many], "L4")
    assert one_kind([many, many]) == ([many, many], "")
    assert one_kind(LAPTOP.hosts) == ([], "")
    assert (
        proposed(tmp_path, model(LLAMA), Site((many,), True, accelerator="L4")).study.resources.accelerator_type == "L4"
    )


def test_an_unseen_model_gets_a_useful_study_that_says_what_was_not_seen(tmp_path: Path) -> None:
    weights = size_by_name("org/Big-70B")
    unseen = Model("org/Big-70B", {}, weights, unseen=("the model's config.json: not here",), by_name=True)
    found = proposed(tmp_path, unseen, EIGHT_GPUS)
    assert "# Not seen: the model's config.json: not here" in found.text
    assert found.study.engine.args["tensor-parallel-size"] == 2
    assert "max-num-seqs" in found.study.space.by_name
    assert found.study.trial.timeout_s >= 3600, "the first start fetches it"
    nameless = proposed(tmp_path, Model("org/x", {}, unseen=("its config",)), LAPTOP)
    assert {"max-num-seqs", "block-size"} <= set(nameless.study.space.by_name)
    small = proposed(tmp_path, unseen, ONE_GPU)
    assert small.study.engine.args.get("tensor-parallel-size") is None, "a guess is no ground to refuse"
    assert "of the size that its name tells, weights 130.4 GiB do not fit in 24.0 GiB" in " ".join(small.unseen)


def test_a_model_that_does_not_fit_and_traffic_that_is_too_long_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'org/name' does not fit on .*: weights 87\.\d GiB do not fit in 24\.0 GiB"):
        proposed(tmp_path, model(MIXTRAL), ONE_GPU)
    with pytest.raises(ConfigError, match=r"--traffic: its longest requests have 9,600 tokens.* takes 8,192"):
        proposed(tmp_path, model(SMOLLM), LAPTOP, traffic="N(6000,500)/(600,100)")


# --- time ---


def test_more_time_gets_more_trials_parameters_and_load_levels(tmp_path: Path) -> None:
    short, long = (proposed(tmp_path, model(SMOLLM), LAPTOP, minutes=minutes).study for minutes in (15, 240))
    assert short.search.trials >= 4
    assert (short.verify.top, short.verify.restarts) == (1, 3)
    assert short.search.time_budget == 900
    assert (long.verify.top, long.verify.restarts) == (2, 5)
    assert long.search.trials > 5 * short.search.trials
    assert len(long.space.by_name) > len(short.space.by_name)
    assert (len(short.workload.concurrency), len(long.workload.concurrency)) == (1, 2)


def test_too_little_time_is_refused_with_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--minutes 3: is too short.*\n.*--minutes \d+") as caught:
        proposed(tmp_path, model(SMOLLM), LAPTOP, minutes=3)
    enough = int(re.findall(r"--minutes (\d+)", str(caught.value))[-1])
    assert proposed(tmp_path, model(SMOLLM), LAPTOP, minutes=enough).plan.seconds <= enough * 60
    with pytest.raises(ConfigError, match="or promises at p90"):
        proposed(tmp_path, model(SMOLLM), LAPTOP, minutes=3, slo={"ttft_ms": {"p99": 500}})


def test_a_percentile_gets_the_requests_that_it_needs(tmp_path: Path) -> None:
    study = proposed(tmp_path, model(SMOLLM), LAPTOP, slo={"ttft_ms": {"p99": 500}, "tpot_ms": {"mean": 50}}).study
    assert study.workload.requests >= 1.1 * 299
    assert study.objective.slo == {"ttft_ms": {"p99": 500}, "tpot_ms": {"mean": 50}}


def test_earlier_runs_of_the_model_tell_how_long_a_trial_takes(tmp_path: Path) -> None:
    first = proposed(tmp_path, model(SMOLLM), LAPTOP)
    seconds = {"start": 200.0, "warmup": 10.0, "load": 90.0, "stop": 5.0, "total": 310.0}
    row = TrialRow(0, "a", "baseline", {}, State.MEASURED, TrialResult(seconds=seconds))
    unlike = replace(row.result, seconds={**seconds, "load": 9.0}, hardware="another machine")
    elsewhere = replace(row, number=1, result=unlike)
    ResultsFolder.create(tmp_path / "results", first.study).write_rows([row, elsewhere])
    again = proposed(tmp_path, model(SMOLLM), LAPTOP)
    assert again.plan.trial_s == pytest.approx(310 + 2.5), "Ray's actor comes on top"
    assert "by 1 trial of earlier runs" in again.text
    other = proposed(tmp_path, model(SMOLLM, name="org/other"), LAPTOP)
    assert other.plan.trial_s == first.plan.trial_s


# --- for any model and machine ---


@st.composite
def models(draw: st.DrawFn) -> Model:
    config = dict(draw(st.sampled_from([SMOLLM, LLAMA, MIXTRAL, DEEPSEEK, {"model_type": "strange"}, {}])))
    for key, sizes in {
        "num_attention_heads": [9, 14, 16, 32, 40, 71],
        "num_key_value_heads": [1, 2, 3, 8],
        "num_hidden_layers": [1, 24, 80],
        "vocab_size": [32000, 256000],
    }.items():
        if config.get(key):
            config[key] = draw(st.sampled_from([config[key], *sizes]))
    longest = draw(st.sampled_from([None, 16, 100, 2048, 131072]))
    guessed = draw(st.sampled_from([None, Weights(3 * 10**8), Weights(0, 7 * 10**9)]))
    characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    name = draw(st.text(characters, min_size=1, max_size=40).filter(lambda text: not text.startswith("-")))
    counted = memory.counted_weights(config)
    return Model(name, config, counted or guessed, longest, by_name=counted is None and draw(st.booleans()))


@st.composite
def sites(draw: st.DrawFn) -> Site:
    on_gpus = draw(st.booleans())
    hosts = [
        Host(
            cpus=(cpus := draw(st.integers(1, 256))),
            cores=tuple(range(0, cpus, draw(st.sampled_from([1, 2])))),
            memory_gib=(size := draw(st.sampled_from([2.0, 7.5, 64.0, 2048.0]))),
            numa_gib=(size / (nodes := draw(st.sampled_from([1, 2, 8]))),) * nodes,
            gpus=draw(st.integers(1, 8)) if on_gpus else 0,
            gpu_gib=draw(st.sampled_from([None, 16, 24, 80, 192])) if on_gpus else None,
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    return Site(tuple(hosts), on_gpus)


@st.composite
def wishes(draw: st.DrawFn, which: Model) -> Wishes:
    traffic = draw(st.sampled_from([None, "D(1,1)", "D(9000,10)", "N(300,100)/(20,5)", "U(1,4000)/(1,90)"]))
    limits: list[dict[str, dict[str, float]]] = [
        {},
        {"ttft_ms": {"p99": 0.5}},
        {"e2el_ms": {"p50": 1e6, "mean": 3}, "itl_ms": {"p95": 7}},
    ]
    slo = draw(st.sampled_from(limits))
    return Wishes(which.name, traffic, slo, draw(st.sampled_from([None, 7.3, 60, 100_000])))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), which=models(), site=sites())
def test_any_proposal_is_a_sound_study_that_fits(tmp_path: Path, data: st.DataObject, which: Model, site: Site) -> None:
    wanted = data.draw(wishes(which))
    try:
        found = propose(wanted, which, site, tmp_path)
    except ConfigError as error:
        reject_unless(str(error).startswith(("--minutes", "--traffic", "model: ", "objective.slo.")), error)
        return
    study = parse_study(yaml.safe_load(found.text))
    assert study.model == which.name
    assert study.objective.slo == wanted.limits
    check_study(study, tmp_path)
    if not which.by_name:
        assert refused(study, which, site) == []
    if wanted.minutes is not None:
        assert found.plan.seconds <= wanted.minutes * 60
    assert all(text.isprintable() for text in found.text.splitlines())


# --- its parts ---


@pytest.mark.parametrize(
    ("config", "tokenizer", "longest"),
    [
        ({"max_position_embeddings": 4096}, {}, 4096),
        ({"text_config": {"max_position_embeddings": 4096}}, {}, 4096),
        ({"n_positions": 1024}, {"model_max_length": 512}, 512),
        ({"max_position_embeddings": 4096}, {"model_max_length": 10**30}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, {}, 8192),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": math.inf}}, {}, 4096),
        ({"hidden_size": 64}, {"model_max_length": 512}, None),
    ],
)
def test_the_longest_request_is_what_the_engine_takes(
    config: dict[str, Any], tokenizer: dict[str, Any], longest: int | None
) -> None:
    assert longest_request(config, tokenizer) == longest


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", Weights(8 * 10**9)),
        ("org/Mixtral-8x7B-v0.1", Weights(56 * 10**9)),
        ("org/SmolLM2-135M", Weights(135 * 10**6)),
        ("org/Qwen2.5-0.5B-Instruct-AWQ", Weights(0, 25 * 10**7)),
        ("org/thing-70b-fp8", Weights(0, 70 * 10**9)),
        ("7B/thing", None),
        ("org/bert-v2", None),
    ],
)
def test_a_name_may_tell_a_size(name: str, weights: Weights | None) -> None:
    assert size_by_name(name) == weights


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"traffic": "128,32"}, r"--traffic: should be D\(in,out\)"),
        ({"traffic": "D(0,3)"}, "--traffic: at least 1 token"),
        ({"traffic": "U(9,3)/(1,2)"}, "--traffic: `min <= max` must hold"),
        ({"slo": ["ttft_ms.p90"]}, "--slo 'ttft_ms.p90': write a latency, a statistic and a limit"),
        ({"slo": ["ttft.p90=5"]}, "there is no latency 'ttft'. Did you mean 'ttft_ms'?"),
        ({"slo": ["ttft_ms.p9=5"]}, "there is no statistic 'p9'. Did you mean 'p99'?"),
        ({"slo": ["ttft_ms.p90=500ms"]}, "'500ms' is no number of milliseconds"),
        ({"slo": ["ttft_ms.p90=-1"]}, "a limit is above 0, but got -1"),
        ({"slo": ["ttft_ms.p90=nan"]}, "a limit is above 0, but got nan"),
        ({"slo": ["ttft_ms.p90=5", "ttft_ms.p90=6"]}, "has a limit already"),
        ({"minutes": 0.0}, "--minutes: is a number above 0"),
        ({"minutes": math.nan}, "--minutes: is a number above 0"),
    ],
    ids=str,
)
def test_a_wish_that_is_wrong_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_wishes(**{"model": "org/name", "traffic": None, "slo": [], "minutes": None, **options})


def test_several_promises_are_taken_together() -> None:
    texts = ["ttft_ms.p90=500", "ttft_ms.mean=100.5", "tpot_ms.p50=50"]
    assert parse_wishes("m", None, texts, None).limits == {
        "ttft_ms": {"p90": 500, "mean": 100.5},
        "tpot_ms": {"p50": 50},
    }


@pytest.mark.parametrize("name", ["---", "a" * 100, "/models/my model (1)", "org/ü", "con\nfig", "0"])
def test_a_study_is_named_after_its_model_whatever_that_is(name: str) -> None:
    study = parse_study({"study": study_name(name), "model": "m", "search_space": {"seed": "bool"}})
    assert study.study == study_name(name)


@pytest.mark.parametrize(
    "value", ["0-1", "yes", "1e3", "a: b", "# x", "a\nb", "\x85", "é", "", {"a": [None, True, 0.5]}], ids=ascii
)
def test_any_value_is_read_back_as_it_was_written(value: Any) -> None:
    text = write_page({"a": value, "b": {"c": value}}, {("b", "c"): ["two\nlines: {", "x" * 200]}, ["head\n- x"])
    assert yaml.safe_load(text) == {"a": value, "b": {"c": value}}
    assert "\n" not in scalar(value)


@pytest.mark.parametrize("name", shipped())
def test_the_comments_of_a_shipped_space_are_found(name: str) -> None:
    found = explained(name)
    assert {parameter: one.distribution for parameter, one in found.items()} == yaml.safe_load(
        (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    )["search_space"]
    assert all(one.why for one in found.values())
