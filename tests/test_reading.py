"""Engine logs are read right: real ones, GPU failures in vLLM's words, and the traps of healthy and stopped servers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.engine.reading import (
    ANY_RULES,
    VLLM_RULES,
    Diagnosis,
    FailureRule,
    LogReader,
    diagnose,
    split_stamp,
)
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage

LOGS = Path(__file__).parent / "engine_logs"
CORPUS: list[dict[str, Any]] = yaml.safe_load((LOGS / "expected.yaml").read_text())
IDS = [case["file"] for case in CORPUS]
STAMP = "2026-11-23T00:31:22.123Z [weights] "


def _lines(case: dict[str, Any]) -> list[str]:
    text = (LOGS / str(case["file"])).read_text()
    return text.splitlines(keepends=True)


def _read(case: dict[str, Any], lines: Sequence[str]) -> Diagnosis:
    return diagnose(lines, exit_code=case["exit_code"], ended_by_us=case.get("ended_by_us", False))


# --- real logs ---


@pytest.mark.parametrize("case", CORPUS, ids=IDS)
def test_a_real_log_is_read_right(case: dict[str, Any]) -> None:
    found = _read(case, _lines(case))
    assert found.stage == case["stage"]
    assert (found.failure and found.failure.kind) == case["kind"]
    if found.failure is not None:
        assert found.failure.blame == case["blame"]
        assert case["evidence"] in found.failure.evidence
        assert found.failure.stage == case["stage"]
        assert found.failure.remedy


@pytest.mark.parametrize("case", CORPUS, ids=IDS)
def test_a_log_with_our_stamps_is_read_as_one_without(case: dict[str, Any]) -> None:
    lines = _lines(case)
    assert _read(case, [STAMP + line for line in lines]) == _read(case, lines)


@pytest.mark.parametrize("case", CORPUS, ids=IDS)
def test_where_the_log_names_a_cause_the_exit_code_is_not_needed(case: dict[str, Any]) -> None:
    found = diagnose(_lines(case), exit_code=None)
    assert (found.failure and found.failure.kind) == (None if case.get("silent") else case["kind"])


def test_every_log_of_the_corpus_is_in_its_table() -> None:
    assert sorted(IDS) == sorted(path.name for path in LOGS.glob("*.log"))


# --- stages ---


def _stages(lines: Sequence[str]) -> list[tuple[int, float]]:
    reader, seen = LogReader(VLLM_RULES), []
    for line in lines:
        reader.feed(line)
        seen.append((reader.stage.order, reader.share))
    return seen


_SOME_LINES = [line for case in CORPUS for line in _lines(case) if any(r.mark in line for r in VLLM_RULES.stages)]


@given(st.lists(st.sampled_from(_SOME_LINES) | st.text(), max_size=30))
def test_the_stage_and_its_share_never_go_back(lines: list[str]) -> None:
    seen = _stages(lines)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("line", "stage", "share"),
    [
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00]", Stage.WEIGHTS, 0.5),
        ("Loading pt checkpoint shards: 100% Completed | 4/4 [00:09<00:00]", Stage.WEIGHTS, 1.0),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  40%|████      | 4/10", Stage.GRAPH_CAPTURE, 0.4),
        ("Capturing CUDA graphs:   0%| | 0/9\rCapturing CUDA graphs:  33%|███ | 3/9", Stage.GRAPH_CAPTURE, 0.33),
        ("Dynamo bytecode transform time: 5.03 s", Stage.COMPILATION, 0.0),
        ("Available KV cache memory: 33.41 GiB", Stage.KV_CACHE, 0.0),
        ("GPU KV cache size: 311,632 tokens, Maximum concurrency 8x", Stage.KV_CACHE, 0.0),
        ("Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup.", Stage.ARGUMENTS, 0.0),
        ('INFO:     10.0.0.1:4 - "POST /tokenize HTTP/1.1" 200 OK', Stage.READY, 0.0),
        ('INFO:     10.0.0.1:4 - "POST /v1/chat/completions HTTP/1.1" 200 OK', Stage.LOAD, 0.0),
        ('INFO:     10.0.0.1:4 - "POST /v1/completions HTTP/1.1" 500 Internal Server Error', Stage.READY, 0.0),
        ("Engine 000: Avg prompt throughput: 9.1 tokens/s, Avg generation throughput: 41.7 tokens/s", Stage.LOAD, 0.0),
        ("Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 0.0 tokens/s", Stage.READY, 0.0),
    ],
)
def test_a_line_shows_its_stage(line: str, stage: Stage, share: float) -> None:
    reader = LogReader(VLLM_RULES)
    reader.feed(line)
    assert (reader.stage, reader.share) == (stage, share)


def test_serving_begins_when_the_engine_says_so() -> None:
    reader = LogReader()
    reader.feed("INFO:     Waiting for application startup.")
    assert not reader.serving
    reader.feed("INFO:     Application startup complete.")
    assert reader.serving


def test_only_our_own_stamp_is_split_off() -> None:
    assert split_stamp(STAMP + "  File x\n") == "  File x\n"
    assert split_stamp(STAMP) == ""
    assert split_stamp("2026-11-23T00:31:22.123Z INFO x") == "2026-11-23T00:31:22.123Z INFO x"


# --- failures that this machine cannot make, in the engine's words ---


def _logged(source: str, *lines: str) -> list[str]:
    return [f"({source} pid=7) ERROR 11-23 01:00:00 [multiproc_executor.py:953] {line}" for line in lines]


START = [
    "(APIServer pid=5) INFO 11-23 00:59:00 [api_utils.py:286] non-default args: {'model': 'bloom-7b1'}",
    "(EngineCore pid=6) INFO 11-23 00:59:20 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: x",
    "(Worker_TP0 pid=7) INFO 11-23 00:59:40 [gpu_model_runner.py:5040] Starting to load model bloom-7b1...",
]
UP = [*START, "INFO:     Application startup complete."]
SERVED = [*UP, 'INFO:     127.0.0.1:4 - "POST /v1/completions HTTP/1.1" 200 OK']
ECHO = [
    *_logged("EngineCore", "EngineCore failed to start.", "Traceback (most recent call last):", '  File "core.py"'),
    *_logged("EngineCore", "Exception: WorkerProc initialization failed due to an exception in a background process."),
    "Traceback (most recent call last):",
    '  File "utils.py", line 1431, in wait_for_engine_startup',
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
]


def _start_that_failed_with(*message: str, frame: str = "in init_device") -> list[str]:
    trace = ("Traceback (most recent call last):", f'  File "gpu_worker.py", line 5, {frame}', "    raise", *message)
    return [*START, *_logged("Worker_TP0", "WorkerProc failed to start.", *trace), *ECHO]


def _failure(lines: Sequence[str], exit_code: int | None = 1) -> Failure:
    failure = diagnose(lines, exit_code=exit_code).failure
    assert failure is not None
    return failure


@pytest.mark.parametrize(
    ("message", "kind", "blame", "remedy"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of "
            "79.19 GiB of which 1.06 GiB is free.",
            Kind.OUT_OF_MEMORY,
            Blame.PARAMETERS,
            "lacked 2.50 GiB",
        ),
        (
            "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try "
            "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
            Kind.OUT_OF_MEMORY,
            Blame.PARAMETERS,
            "below 1024",
        ),
        (
            "ValueError: Free memory on device cuda:0 (20.1/79.19 GiB) on startup is less than desired GPU memory "
            "utilization (0.9, 71.27 GiB). Decrease GPU memory utilization or reduce GPU memory used by other "
            "processes.",
            Kind.DEVICE_BUSY,
            Blame.ENVIRONMENT,
            "Only 20.1 of 79.19 GiB",
        ),
        (
            "ValueError: Free memory on device cuda:0 (78.2/79.19 GiB) on startup is less than desired GPU memory "
            "utilization (0.99, 78.4 GiB). Decrease GPU memory utilization or reduce GPU memory used by other "
            "processes.",
            Kind.OUT_OF_MEMORY,
            Blame.PARAMETERS,
            "below 0.99",
        ),
        (
            "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (7.41 GiB). Based on the available memory, "
            "the estimated maximum model length is 60672. Try increasing `gpu_memory_utilization`",
            Kind.KV_CACHE_TOO_SMALL,
            Blame.PARAMETERS,
            "at most 60672",
        ),
        (
            "ValueError: The model's max seq len (8192) is larger than the maximum number of tokens that can be "
            "stored in KV cache (3344). Try increasing `gpu_memory_utilization`",
            Kind.KV_CACHE_TOO_SMALL,
            Blame.PARAMETERS,
            "3344 tokens",
        ),
        (
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
            "initializing the engine",
            Kind.KV_CACHE_TOO_SMALL,
            Blame.PARAMETERS,
            "gpu-memory-utilization",
        ),
        (
            "ValueError: max_num_seqs (512) exceeds available Mamba cache blocks (402).",
            Kind.KV_CACHE_TOO_SMALL,
            Blame.PARAMETERS,
            "below 512",
        ),
        (
            "AssertionError: Error in memory profiling. Initial free memory 60.2 GiB, current free memory 70.9 GiB.",
            Kind.DEVICE_BUSY,
            Blame.ENVIRONMENT,
            "its own",
        ),
        (
            "torch.AcceleratorError: CUDA error: CUDA-capable device(s) is/are busy or unavailable",
            Kind.DEVICE_BUSY,
            Blame.ENVIRONMENT,
            "exclusively",
        ),
        ("RuntimeError: No CUDA GPUs are available", Kind.WORKER_LOST, Blame.ENVIRONMENT, "CUDA_VISIBLE_DEVICES"),
        (
            "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)",
            Kind.WORKER_LOST,
            Blame.ENVIRONMENT,
            "NCCL_DEBUG",
        ),
        (
            "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
            "[10.0.0.2]:41234",
            Kind.WORKER_LOST,
            Blame.ENVIRONMENT,
            "network",
        ),
        (
            "ValueError: The quantization method modelopt_fp4 is not supported for the current GPU. Minimum "
            "capability: 89. Current capability: 80.",
            Kind.UNSUPPORTED,
            Blame.PARAMETERS,
            "capability 89",
        ),
        (
            "RuntimeError: triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 147456",
            Kind.UNSUPPORTED,
            Blame.PARAMETERS,
            "shared memory",
        ),
        (
            "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 "
            "GPU has compute capability 7.5.",
            Kind.UNSUPPORTED,
            Blame.PARAMETERS,
            "float16",
        ),
        (
            "ValueError: Selected backend AttentionBackendEnum.FLASH_ATTN is not valid for this configuration. "
            "Reason: ['kv_cache_dtype not supported']",
            Kind.UNSUPPORTED,
            Blame.PARAMETERS,
            "attention backend",
        ),
        (
            "ValueError: No valid attention backend found for cuda with AttentionSelectorConfig(head_size=72). "
            "Reasons: {FLASH_ATTN: [head_size not supported]}.",
            Kind.UNSUPPORTED,
            Blame.PARAMETERS,
            "attention backend",
        ),
        ("ValueError: Head size 72 is not supported by PagedAttention.", Kind.UNSUPPORTED, Blame.PARAMETERS, "head"),
        (
            "NotImplementedError: FP8 KV cache is not yet there for this layer",
            Kind.UNSUPPORTED,
            Blame.PARAMETERS,
            "search space",
        ),
        (
            "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
            Kind.UNSUPPORTED,
            Blame.STUDY,
            "build",
        ),
        (
            "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
            Kind.ENGINE_DIED,
            Blame.PARAMETERS,
            "crashed",
        ),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)",
            Kind.OUT_OF_MEMORY,
            Blame.PARAMETERS,
            "machine's memory",
        ),
        (
            "OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'",
            Kind.OUT_OF_MEMORY,
            Blame.ENVIRONMENT,
            "/dev/shm",
        ),
        (
            "OSError: [Errno 28] No space left on device: '/cache/torch'",
            Kind.UNKNOWN,
            Blame.ENVIRONMENT,
            "make room",
        ),
    ],
)
def test_a_gpu_failure_is_known_by_the_words_of_the_engine(message: str, kind: Kind, blame: Blame, remedy: str) -> None:
    failure = _failure(_start_that_failed_with(message))
    assert (failure.kind, failure.blame) == (kind, blame)
    assert failure.evidence == message
    assert remedy in failure.remedy
    assert failure.stage is Stage.WEIGHTS


@pytest.mark.parametrize(
    ("message", "kind", "blame"),
    [
        (
            "huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: Root=1-6)",
            Kind.ACCESS_DENIED,
            Blame.STUDY,
        ),
        ("OSError: You are trying to access a gated repo.", Kind.ACCESS_DENIED, Blame.STUDY),
        (
            "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1-6)",
            Kind.MODEL_NOT_FOUND,
            Blame.STUDY,
        ),
        (
            "OSError: meta-lama/x is not a local folder and is not a valid model identifier listed on the hub",
            Kind.MODEL_NOT_FOUND,
            Blame.STUDY,
        ),
        (
            "huggingface_hub.errors.LocalEntryNotFoundError: An error happened while trying to locate the file on the "
            "Hub and we cannot find the requested files in the local cache. Please check your connection and try "
            "again or make sure your Internet connection is on.",
            Kind.MODEL_NOT_FOUND,
            Blame.ENVIRONMENT,
        ),
        (
            "huggingface_hub.errors.HfHubHTTPError: 503 Server Error: Service Unavailable for url",
            Kind.MODEL_NOT_FOUND,
            Blame.ENVIRONMENT,
        ),
        (
            "ValueError: Model architectures ['FooForCausalLM'] are not supported for now. Supported: []",
            Kind.UNSUPPORTED,
            Blame.STUDY,
        ),
    ],
)
def test_a_model_that_cannot_be_had_is_not_the_parameters_fault(message: str, kind: Kind, blame: Blame) -> None:
    failure = _failure(_uncaught(message))
    assert (failure.stage, failure.kind, failure.blame) == (Stage.CONFIGURATION, kind, blame)


def _uncaught(*message: str) -> list[str]:
    return [START[0], "Traceback (most recent call last):", '  File "a.py", line 1, in main', *message]


def test_a_capability_that_lacks_is_unsupported_also_where_the_configuration_says_so() -> None:
    failure = _failure(
        _uncaught(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig",
            "  Value error, The quantization method fp8 is not supported for the current GPU. Minimum capability: 89. "
            "Current capability: 80. [type=value_error, input_value=ArgsKwargs(()), input_type=ArgsKwargs]",
        )
    )
    assert failure.kind is Kind.UNSUPPORTED
    assert failure.evidence.endswith("Current capability: 80.")


def test_a_port_that_is_taken_after_the_start_is_seen() -> None:
    bind = "ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 8000): address already in use"
    for exit_code in (None, 1):
        failure = _failure([*UP, bind, "INFO:     Waiting for application shutdown."], exit_code)
        assert (failure.kind, failure.blame) == (Kind.PORT_IN_USE, Blame.ENVIRONMENT)


def test_an_engine_that_is_not_installed_is_the_studys_fault() -> None:
    for line in (
        "/usr/bin/python3: No module named vllm",
        "/opt/my env/bin/python3: No module named vllm",
        "/usr/bin/python3: Error while finding module specification for 'vllm.entrypoints.openai.api_server' "
        "(ModuleNotFoundError: No module named 'vllm')",
    ):
        failure = _failure([line, "see the manual"])
        assert (failure.stage, failure.kind, failure.blame) == (Stage.ARGUMENTS, Kind.UNSUPPORTED, Blame.STUDY)
        assert failure.evidence == line


def test_the_format_of_older_versions_is_read() -> None:
    lines = [
        line.replace(" [multiproc_executor.py:953]", " engine.py:366]")
        for line in _start_that_failed_with("OSError: x")
    ]
    assert _failure(lines).evidence == "OSError: x"


def test_of_a_chain_of_exceptions_the_known_one_counts() -> None:
    chain = (
        "OSError: [Errno 101] Network is unreachable",
        "",
        "During handling of the above exception, another exception occurred:",
        "",
        "Traceback (most recent call last):",
        '  File "weight_utils.py", line 2, in download',
        "requests.exceptions.ConnectionError: Max retries exceeded with url: /api/models/x",
        "",
        "The above exception was the direct cause of the following exception:",
        "",
        "Traceback (most recent call last):",
        '  File "loader.py", line 3, in load_model',
        "RuntimeError: weights could not be had",
    )
    failure = _failure(_start_that_failed_with(*chain))
    assert (failure.kind, failure.blame) == (Kind.MODEL_NOT_FOUND, Blame.ENVIRONMENT)
    assert "Max retries exceeded" in failure.evidence


def test_an_error_that_is_not_known_is_unknown_and_its_root_is_the_evidence() -> None:
    failure = _failure(_start_that_failed_with("RuntimeError: the flux capacitor wants 1.21 GW"))
    assert (failure.kind, failure.blame) == (Kind.UNKNOWN, Blame.PARAMETERS)
    assert failure.evidence == "RuntimeError: the flux capacitor wants 1.21 GW"


def test_an_exception_without_a_message_shows_the_source_line_that_raised_it() -> None:
    trace = ("Traceback (most recent call last):", '  File "x.py", line 1, in f', "    assert a == b", "AssertionError")
    assert _failure([*START, *_logged("EngineCore", *trace)]).evidence == "AssertionError: assert a == b"


def test_a_worker_that_dies_under_load_is_lost_though_the_server_exits_with_0() -> None:
    death = _logged("EngineCore", "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.")
    failure = _failure([*SERVED, *death, "INFO:     Shutting down"], exit_code=0)
    assert (failure.stage, failure.kind, failure.blame) == (Stage.LOAD, Kind.WORKER_LOST, Blame.PARAMETERS)


def test_memory_that_runs_out_under_load_is_told_from_the_workers_traceback() -> None:
    trace = ("Traceback (most recent call last):", '  File "x.py", line 1, in execute_model', "    y")
    oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 512.00 MiB."
    lines = [
        *SERVED,
        *_logged("Worker_TP0", "WorkerProc hit an exception.", *trace, oom),
        *_logged("EngineCore", "EngineCore encountered a fatal error.", *trace, "RuntimeError: Worker failed with "),
        *_logged("APIServer", "AsyncLLM output_handler failed.", *trace, "EngineDeadError: EngineCore encountered an"),
    ]
    failure = _failure(lines, exit_code=None)
    assert (failure.stage, failure.kind, failure.evidence) == (Stage.LOAD, Kind.OUT_OF_MEMORY, oom)


# --- ends by signal ---


@pytest.mark.parametrize(
    ("exit_code", "kind", "name"),
    [
        (-9, Kind.OUT_OF_MEMORY, "SIGKILL"),
        (137, Kind.OUT_OF_MEMORY, "SIGKILL"),
        (-11, Kind.ENGINE_DIED, "SIGSEGV"),
        (139, Kind.ENGINE_DIED, "SIGSEGV"),
        (-6, Kind.ENGINE_DIED, "SIGABRT"),
        (-7, Kind.OUT_OF_MEMORY, "SIGBUS"),
        (-4, Kind.UNSUPPORTED, "SIGILL"),
        (-31, Kind.UNKNOWN, "signal 31"),
    ],
)
def test_an_end_by_a_signal_without_an_error_is_told_from_the_exit_code(exit_code: int, kind: Kind, name: str) -> None:
    failure = _failure(SERVED, exit_code=exit_code)
    assert failure.kind is kind
    assert name in failure.evidence
    assert diagnose(SERVED, exit_code=exit_code, ended_by_us=True).failure is None


def test_what_to_lower_after_a_kill_for_memory_is_told_in_the_engines_own_words() -> None:
    assert "max-num-seqs" in _failure(SERVED, exit_code=-9).remedy
    other = diagnose(["listening on port 8000"], exit_code=-9, rules=ANY_RULES).failure
    assert other is not None
    assert "such as context, batch or requests at once, and look at dmesg" in other.remedy
    assert "max-num-seqs" not in other.remedy


def test_a_shared_memory_that_is_too_small_is_not_the_parameters_fault() -> None:
    assert _failure(START, exit_code=-7).blame is Blame.ENVIRONMENT


TRITON = [
    "ERROR 11-22 01:28:01 [config.py:36] Failed to import Triton kernels. Please make sure your triton version is "
    "compatible. Error: No module named 'triton_kernels.routing'"
]
OPTIONAL = ["Traceback (most recent call last):", '  File "x"', "ModuleNotFoundError: No module named 'flash_attn'"]


@pytest.mark.parametrize(
    "lines",
    [
        [*START, *TRITON],
        [*START, *OPTIONAL, "warning: falling back", "INFO: going on"],
        [*OPTIONAL, *START],  # the start goes on, though in lines of other processes
        [*START, *_logged("EngineCore", *OPTIONAL), START[2].replace("Worker_TP0", "EngineCore")],
    ],
)
def test_a_server_that_went_on_after_an_error_did_not_end_of_it(lines: list[str]) -> None:
    for rules in (VLLM_RULES, ANY_RULES):
        failure = diagnose(lines, exit_code=-9, rules=rules).failure
        assert failure is not None
        assert failure.evidence.startswith("ended by SIGKILL")
        assert (failure.kind, failure.blame) == (Kind.OUT_OF_MEMORY, Blame.PARAMETERS)
        assert diagnose(lines, exit_code=-15, rules=rules, ended_by_us=True).failure is None


def test_an_error_after_which_its_process_said_no_more_counts_though_the_server_was_killed_then() -> None:
    oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    worker = _logged("Worker_TP0", "Traceback (most recent call last):", '  File "x"', "    raise", oom)
    for after in ([], START[1:2]):
        assert _failure([*START, *worker, *after], exit_code=-9).evidence == oom


def test_an_error_counts_though_other_processes_went_on_or_its_own_while_it_shut_down() -> None:
    oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    worker = _logged("Worker_TP1", "Traceback (most recent call last):", '  File "x"', "    raise", oom)
    said = "INFO 11-23 01:00:00 [x.py:9]"
    hung = [START[0], *worker, f"(Worker_TP0 pid=7) {said} Model loading took 5.1 GiB memory and 3.2 seconds"]
    found = diagnose(hung, exit_code=-15, ended_by_us=True)
    assert (found.stage, found.failure and found.failure.evidence) == (Stage.WEIGHTS, oom)
    source = worker[0].partition(")")[0]
    for exit_code in (-6, -11, 135):
        failure = _failure([*START, *worker, f"{source}) {said} Shutting down worker"], exit_code)
        assert (failure.kind, failure.evidence) == (Kind.OUT_OF_MEMORY, oom)


@pytest.mark.parametrize("exit_code", [None, 0, -15, 143, -2, 130])
def test_an_engine_that_was_asked_to_stop_has_not_failed(exit_code: int | None) -> None:
    assert diagnose(SERVED, exit_code=exit_code) == Diagnosis(Stage.LOAD, None)


def test_an_empty_log_shows_no_stage_and_with_an_exit_code_an_unknown_failure() -> None:
    assert diagnose([]) == Diagnosis(None, None)
    failure = _failure([], exit_code=3)
    assert (failure.stage, failure.kind, failure.blame) == (Stage.ARGUMENTS, Kind.UNKNOWN, Blame.PARAMETERS)
    assert "exit code 3" in failure.evidence


# --- healthy and stopped servers ---

STOP = [
    "(EngineCore pid=6) INFO 11-23 01:32:44 [core.py:1454] [shutdown] EngineCore: trigger received signal=SIGTERM",
    *_logged("EngineCore", "Worker proc VllmWorker-0 died unexpectedly (exit code: -15), shutting down executor."),
    *_logged("APIServer", "AsyncLLM output_handler failed.", "Traceback (most recent call last):", '  File "x"'),
    *_logged("APIServer", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."),
    "INFO:     Shutting down",
]


@pytest.mark.parametrize("exit_code", [None, 0, 1, -15, -9])
def test_what_comes_after_a_stop_on_purpose_is_no_failure(exit_code: int | None) -> None:
    assert diagnose([*SERVED, *STOP], exit_code=exit_code) == Diagnosis(Stage.LOAD, None)


def test_an_error_before_the_stop_counts_also_where_we_stopped_it() -> None:
    failing = _start_that_failed_with("RuntimeError: CUDA error: out of memory")
    found = diagnose([*failing, *STOP], exit_code=-15, ended_by_us=True)
    assert found.failure is not None
    assert found.failure.kind is Kind.OUT_OF_MEMORY


def _healthy_production_log() -> list[str]:
    """Some 20,000 lines of a server that is busy and has seen bad requests."""
    request = [
        'INFO:     10.1.2.3:5{0:04} - "POST /v1/chat/completions HTTP/1.1" 200 OK',
        "(APIServer pid=5) INFO 11-23 02:00:00 [loggers.py:259] Engine 000: Avg prompt throughput: 812.3 tokens/s, "
        "Avg generation throughput: 1402.1 tokens/s, Running: 17 reqs, Waiting: 0 reqs, GPU KV cache usage: 31.2%",
        'INFO:     10.1.2.3:5{0:04} - "GET /metrics HTTP/1.1" 200 OK',
        "(APIServer pid=5) INFO 11-23 02:00:00 [logger.py:40] Received request chatcmpl-{0}: prompt: 'my error: out of "
        "memory, died unexpectedly, EngineDeadError, bloom'",
    ]
    bad = [
        *_logged("APIServer", "Error in preprocessing prompt inputs", "Traceback (most recent call last):", "  File"),
        *_logged("APIServer", "ValueError: This model's maximum context length is 512 tokens."),
        'INFO:     10.1.2.3:50000 - "POST /v1/completions HTTP/1.1" 400 Bad Request',
        "ERROR:    Exception in ASGI application",
        "Traceback (most recent call last):",
        '  File "uvicorn/protocols/http/httptools_impl.py", line 409, in run_asgi',
        "anyio.EndOfStream",
        "",
        "During handling of the above exception, another exception occurred:",
        "",
        "  + Exception Group Traceback (most recent call last):",
        '  |   File "starlette/middleware/base.py", line 1',
        "  | RuntimeError: No response returned.",
        "RuntimeError: No response returned.",
    ]
    lines = [line.format(number) for number in range(2500) for line in request]
    return [*UP, *lines, *bad, *lines]


def test_a_busy_healthy_server_with_bad_requests_has_not_failed() -> None:
    lines = _healthy_production_log()
    assert diagnose(lines) == Diagnosis(Stage.LOAD, None)
    assert diagnose([*lines, *STOP], exit_code=0).failure is None


def test_the_tail_of_a_healthy_servers_log_has_not_failed() -> None:
    assert diagnose(_healthy_production_log()[-3000:]) == Diagnosis(Stage.LOAD, None)
    assert diagnose(_healthy_production_log()[10_004:10_015]) == Diagnosis(Stage.READY, None)


def test_an_engine_that_still_starts_has_not_failed() -> None:
    assert diagnose(START) == Diagnosis(Stage.WEIGHTS, None)


def test_an_error_that_the_start_survives_is_no_failure() -> None:
    trace = ("Error saving model info", "Traceback (most recent call last):", '  File "x"', "OSError: read-only")
    assert diagnose([*START, *_logged("EngineCore", *trace), UP[-1]]).failure is None


def test_of_several_starts_in_one_log_the_last_counts() -> None:
    failing = _start_that_failed_with("RuntimeError: CUDA error: out of memory")
    assert diagnose([*failing, *SERVED]).failure is None
    assert diagnose([*SERVED, *STOP, *failing], exit_code=1).stage is Stage.WEIGHTS


# --- the log as people have it ---


@pytest.mark.parametrize(
    "prefix",
    [
        "vllm-1  | ",
        "2026-11-23T01:00:00.123456789Z stderr F ",
        "2026-11-23T01:00:00.123456789+01:00 ",
        "Nov 23 01:00:00 node7 vllm[123]: ",
        "\x1b[1;36m",
    ],
)
def test_the_prefixes_of_other_collectors_do_no_harm(prefix: str) -> None:
    lines = [prefix + line for line in _start_that_failed_with("RuntimeError: CUDA error: out of memory")]
    assert _failure(lines).kind is Kind.OUT_OF_MEMORY
    uncaught = _uncaught("OSError: the disk is odd")
    assert _failure([prefix + line for line in uncaught]).evidence == "OSError: the disk is odd"


OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def test_what_libraries_print_after_a_traceback_is_none_of_it() -> None:
    warning = "[rank0]:[W1123 00:31:22.102 ProcessGroupNCCL.cpp:1479] Warning: destroy_process_group() was not called"
    for line in (warning, warning.removeprefix("[rank0]:")):
        failure = _failure([*_uncaught("RuntimeError: the mask is odd"), line])
        assert (failure.kind, failure.evidence) == (Kind.UNKNOWN, "RuntimeError: the mask is odd")
    ranked = [START[0], *(f"[rank0]: {line}" for line in _uncaught("RuntimeError: the mask is odd")[1:]), warning]
    assert _failure(ranked).evidence == "RuntimeError: the mask is odd"


@pytest.mark.parametrize("prefix", ["", "(Worker pid=7) ERROR 11-23 01:00:00 [x.py:9] "])
def test_the_exceptions_of_a_group_are_read(prefix: str) -> None:
    group = [
        "  + Exception Group Traceback (most recent call last):",
        '  |   File "a.py", line 1, in f',
        "  | ExceptionGroup: unhandled errors in a TaskGroup (2 sub-exceptions)",
        "  +-+---------------- 1 ----------------",
        "    | ValueError: a | b",
        "    +---------------- 2 ----------------",
        "    | Traceback (most recent call last):",
        '    |   File "b.py", line 2, in g',
        "    |     | boom()",
        f"    | {OOM}",
        "    +------------------------------------",
        "plain text",
    ]
    assert _failure([START[0], *(prefix + line for line in group)]).evidence == OOM
    without = [line for line in group if OOM not in line and "boom" not in line and "b.py" not in line]
    assert _failure([START[0], *(prefix + line for line in without)]).evidence == "ValueError: a | b"


@pytest.mark.parametrize(("last", "kind"), [("SystemExit: 1", Kind.OUT_OF_MEMORY), ("KeyboardInterrupt", None)])
def test_an_exit_because_of_an_error_is_no_stop_on_purpose(last: str, kind: Kind | None) -> None:
    again = ("", "During handling of the above exception, another exception occurred:", "")
    lines = _uncaught(OOM, *again, "Traceback (most recent call last):", '  File "x.py"', last)
    failure = diagnose(lines, exit_code=0).failure
    assert (failure and failure.kind) == kind


def test_a_connection_that_was_lost_counts_where_no_error_says_why() -> None:
    trace = ("Traceback (most recent call last):", '  File "x"')
    nccl = "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, remote process exited or network error"
    died = _logged("EngineCore", "Worker proc VllmWorker-1 died unexpectedly (exit code: 1), shutting down executor.")
    one, two = _logged("Worker_TP1", *trace, nccl), _logged("Worker_TP0", *trace, OOM)
    assert _failure([*START, *one, *two, *died]).evidence == OOM
    assert _failure([*START, *one, *died]).evidence == nccl


def test_requests_that_a_starting_server_makes_are_not_its_own() -> None:
    head = '"HEAD /m/x/resolve/main/config.json HTTP/1.1" 200 0'
    for line in (
        f"DEBUG:urllib3.connectionpool:https://hub:443 {head}",
        f"DEBUG 11-22 01:28:01 [connectionpool.py:544] {head}",
    ):
        assert diagnose([START[0], line]).stage is Stage.CONFIGURATION


def test_a_second_start_that_did_not_take_its_arguments_is_one() -> None:
    failing = _start_that_failed_with("RuntimeError: CUDA error: out of memory")
    failure = _failure(
        [*failing, "usage: vllm [options]", "vllm serve: error: unrecognized arguments: --x"], exit_code=2
    )
    assert (failure.stage, failure.kind) == (Stage.ARGUMENTS, Kind.BAD_ARGUMENT)
    assert diagnose([*failing, "usage: x", "vllm serve: error: argument --x: no"]).stage is Stage.ARGUMENTS


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080", Kind.PORT_IN_USE),
        ("Address already in use", Kind.PORT_IN_USE),
        ("2026/11/23 00:31:22 listen tcp 127.0.0.1:8000: bind: address already in use", Kind.PORT_IN_USE),
        ("ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 9437184000", Kind.OUT_OF_MEMORY),
        ("llama_model_load: error loading model: unable to allocate Metal buffer", Kind.OUT_OF_MEMORY),
    ],
)
def test_what_servers_in_other_languages_say_is_known(line: str, kind: Kind) -> None:
    failure = diagnose([line, "main: exiting due to an error"], exit_code=1, rules=ANY_RULES).failure
    assert failure is not None
    assert (failure.kind, failure.evidence) == (kind, line)


def test_a_port_that_is_taken_is_no_failure_where_the_server_tries_another() -> None:
    lines = ["address already in use: 8000 bind, trying 8001", "loading", "loading"]
    assert diagnose(lines, ended_by_us=True, rules=ANY_RULES).failure is None


@pytest.mark.parametrize(
    ("lines", "stage", "kind"),
    [
        (
            [
                "[2026-11-23 01:00:00] server_args=ServerArgs(model_path='x')",
                "[2026-11-23 01:00:09 TP0] Load weight begin. avail mem=10.00 GB",
                "[2026-11-23 01:00:10 TP0] Scheduler hit an exception: Traceback (most recent call last):",
                '  File "sglang/srt/managers/scheduler.py", line 3, in run_scheduler_process',
                "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
                "",
                "[2026-11-23 01:00:11] Received sigquit from a child process. It usually means the child failed.",
            ],
            Stage.WEIGHTS,
            Kind.KV_CACHE_TOO_SMALL,
        ),
        (
            [
                "llama_model_load: error loading model: unknown model architecture: 'foo'",
                "main: exiting due to model loading error",
            ],
            Stage.ARGUMENTS,
            Kind.UNSUPPORTED,
        ),
        (["error: invalid argument: --ctx-sise"], Stage.ARGUMENTS, Kind.BAD_ARGUMENT),
    ],
)
def test_common_failures_of_other_engines_are_known(lines: list[str], stage: Stage, kind: Kind) -> None:
    failure = _failure(lines)
    assert (failure.stage, failure.kind) == (stage, kind)


@pytest.mark.parametrize(
    "secret",
    [
        "hf_AbCdEfGhIjKlMnOpQr",
        "sk-proj-0123456789abcdef",
        "Bearer 0123456789abcdef",
        "https://me:pa55word@host/x",
        "token=0123456789abcdef",
        "'hf_token': '0123456789abcdef'",
        "api_key=0123456789abcdef",
    ],
)
def test_secrets_are_masked(secret: str) -> None:
    failure = _failure(_start_that_failed_with(f"RuntimeError: refused with {secret} here"))
    assert "***" in failure.evidence
    assert not re.search("AbCd|0123|pa55", failure.evidence)
    assert failure.evidence.startswith("RuntimeError: refused with")


def test_evidence_is_one_short_line_without_control_characters() -> None:
    failure = _failure(_start_that_failed_with("RuntimeError: \x1b[31mred\x1b[0m\x07 " + "x" * 2000))
    assert failure.evidence.startswith("RuntimeError: red xxx")
    assert len(failure.evidence) == 500
    assert failure.evidence.isprintable()


# --- rules and robustness ---

ANY_LINE = st.text() | st.sampled_from([*_start_that_failed_with("ValueError: x"), *STOP, *SERVED, ""])


@given(st.lists(ANY_LINE, max_size=40), st.none() | st.integers(-70, 300), st.booleans())
def test_no_text_makes_it_raise(lines: list[str], exit_code: int | None, ended_by_us: bool) -> None:
    found = diagnose(lines, exit_code=exit_code, ended_by_us=ended_by_us)
    assert found.failure is None or found.failure.stage is found.stage
    assert diagnose([STAMP + line for line in lines], exit_code=exit_code, ended_by_us=ended_by_us) == found


@pytest.mark.parametrize("rule", VLLM_RULES.failures, ids=lambda rule: f"{rule.kind}: {rule.pattern[:30]}")
def test_a_remedy_uses_only_what_its_pattern_finds(rule: FailureRule) -> None:
    wanted = {name for _, name, _, _ in Formatter().parse(rule.remedy) if name}
    assert wanted <= set(re.compile(rule.pattern).groupindex)
    assert "\n" not in rule.remedy


def test_stage_rules_are_in_the_order_of_a_start() -> None:
    orders = [rule.stage.order for rule in VLLM_RULES.stages]
    assert orders == sorted(orders)


def test_reading_needs_the_standard_library_only(root: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import raytune_autotuner.engine.reading"
    subprocess.run([sys.executable, "-S", "-E", "-c", code], check=True, timeout=30)
