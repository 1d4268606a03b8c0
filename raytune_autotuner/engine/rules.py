"""What an engine's log lines mean, as data: which text tells a stage, which error is which kind of failure.

Nothing here reads a log; `reading` does. Patterns are kept as text, so that the supervisor of an engine's processes,
which wants the stages only, does not pay for compiling them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from raytune_autotuner.study.failure import Blame, Kind, Stage


@dataclass(frozen=True, slots=True)
class StageRule:
    """A line with the text `mark`, and without the text `unless`, shows that `stage` is reached."""

    stage: Stage
    mark: str
    unless: str = ""
    share: float = 0.0
    """How much of the stage such a line shows to be done."""


@dataclass(frozen=True, slots=True)
class FailureRule:
    """An error in which `pattern` is found is of this kind, and of this one's fault.

    `remedy` is one line; `{name}` in it stands for the pattern's group of that name.
    """

    kind: Kind
    blame: Blame
    pattern: str
    remedy: str
    only_at: tuple[Stage, ...] = ()
    """The furthest stages at which the rule holds; empty: all."""
    within: str = ""
    """Text that must be among the frames of the error's traceback; empty: anywhere."""
    holds: Callable[[re.Match[str]], bool] | None = None
    """A last condition on the values found; None: none."""
    depends: tuple[str, ...] = ()
    """See `Failure.depends`: the parameters that the engine looks at when it decides so, and no others."""
    follows: bool = False
    """Whether such an error may only follow from that of another process."""


@dataclass(frozen=True, slots=True)
class LogRules:
    """How one family of engines writes its log."""

    stages: tuple[StageRule, ...]
    """In the order in which a start passes them."""
    shares: Mapping[Stage, str]
    """Pattern whose last group is the percentage done, in the lines of a stage."""
    failures: tuple[FailureRule, ...]
    """The first that holds counts."""
    echoes: str
    """Errors that only pass on another one."""
    fatal: str
    """Lines after which the server does not go on, whatever its exit code."""
    lone: str
    """Lines that are an error by themselves, without a traceback."""
    harmless: str
    """Lines whose traceback the server survives."""
    shutdown: str
    """Lines of a stop on purpose; what follows is no failure."""
    launch: str
    """A line that only a fresh start has at its beginning, in a log that holds several."""
    spare: str
    """What makes a setting hold less memory, for people."""


_SPARE = "lower the KV cache's size, max-num-seqs or max-num-batched-tokens"
_STARTING = (Stage.ARGUMENTS, Stage.CONFIGURATION, Stage.INITIALIZATION)
_LATE = (Stage.READY, Stage.WARMUP, Stage.LOAD)

_VLLM_STAGES = (
    StageRule(Stage.CONFIGURATION, "non-default args"),
    StageRule(Stage.CONFIGURATION, "Resolved architecture"),
    StageRule(Stage.CONFIGURATION, "in create_engine_config"),
    StageRule(Stage.INITIALIZATION, "Initializing a V1 LLM engine"),
    StageRule(Stage.INITIALIZATION, "Initializing a V0 LLM engine"),
    StageRule(Stage.INITIALIZATION, "[parallel_state.py"),
    StageRule(Stage.INITIALIZATION, "in run_engine_core"),
    StageRule(Stage.WEIGHTS, "Starting to load model"),
    StageRule(Stage.WEIGHTS, "checkpoint shards:"),
    StageRule(Stage.WEIGHTS, "Loading weights took", share=1.0),
    StageRule(Stage.WEIGHTS, "Model loading took", share=1.0),
    StageRule(Stage.COMPILATION, "for vLLM's torch.compile"),
    StageRule(Stage.COMPILATION, "Starting torch.compile"),
    StageRule(Stage.COMPILATION, "Dynamo bytecode transform"),
    StageRule(Stage.COMPILATION, "Compiling a graph for"),
    StageRule(Stage.COMPILATION, "Start compiling function"),
    StageRule(Stage.COMPILATION, "Directly load AOT compilation"),
    StageRule(Stage.COMPILATION, "Directly load the compiled graph"),
    StageRule(Stage.COMPILATION, "torch.compile takes"),
    StageRule(Stage.COMPILATION, "torch.compile took"),
    StageRule(Stage.COMPILATION, "Warming up model for the compilation"),
    StageRule(Stage.KV_CACHE, "Available KV cache memory"),
    StageRule(Stage.KV_CACHE, "KV cache size:"),
    StageRule(Stage.KV_CACHE, "GiB for KV cache on node"),
    StageRule(Stage.KV_CACHE, "kv cache allocation"),
    StageRule(Stage.KV_CACHE, "# GPU blocks:"),
    StageRule(Stage.KV_CACHE, "Memory profiling takes"),
    StageRule(Stage.KV_CACHE, "in _initialize_kv_caches"),
    StageRule(Stage.GRAPH_CAPTURE, "Capturing CUDA graph"),
    StageRule(Stage.GRAPH_CAPTURE, "in capture_model"),
    StageRule(Stage.GRAPH_CAPTURE, "Graph capturing finished", share=1.0),
    StageRule(Stage.READY, "Application startup complete"),
    StageRule(Stage.READY, ' HTTP/1.1" ', unless="connectionpool"),  # whose lines are of requests that it makes itself
    StageRule(Stage.READY, "Avg generation throughput: "),
    StageRule(Stage.LOAD, 'completions HTTP/1.1" 200'),
    StageRule(Stage.LOAD, '/responses HTTP/1.1" 200'),
    StageRule(Stage.LOAD, '/messages HTTP/1.1" 200'),
    StageRule(Stage.LOAD, '/embeddings HTTP/1.1" 200'),
    StageRule(Stage.LOAD, '/generate HTTP/1.1" 200'),
    StageRule(Stage.LOAD, "Avg generation throughput: ", unless="Avg generation throughput: 0.0 "),
)

# SGLang and llama.cpp, as far as people hand their logs to `diagnose`.
_OTHER_STAGES = (
    StageRule(Stage.CONFIGURATION, "server_args=ServerArgs("),
    StageRule(Stage.INITIALIZATION, "Init torch distributed begin"),
    StageRule(Stage.WEIGHTS, "Load weight begin"),
    StageRule(Stage.WEIGHTS, "llama_model_loader: loaded meta data"),
    StageRule(Stage.WEIGHTS, "Load weight end", share=1.0),
    StageRule(Stage.KV_CACHE, "KV Cache is allocated"),
    StageRule(Stage.KV_CACHE, "llama_kv_cache"),
    StageRule(Stage.GRAPH_CAPTURE, "Capture cuda graph begin"),
    StageRule(Stage.GRAPH_CAPTURE, "Capture cuda graph end", share=1.0),
    StageRule(Stage.READY, "The server is fired up and ready to roll"),
    StageRule(Stage.READY, "server is listening on"),
)


def _held_by_others(found: re.Match[str]) -> bool:
    """Whether more of the device is taken than an idle driver takes (3 % and at least 1.5 GiB)."""
    total = float(found["total"])
    return total - float(found["free"]) > max(1.5, 0.03 * total)


_FREE_ON_START = (
    r"memory on (?:device|node) (?P<device>\S+) \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is less than "
    r"desired (?:GPU|CPU) memory utilization \((?P<share>[\d.]+), (?P<wanted>[\d.]+) GiB\)"
)


def _parameters(kind: Kind, pattern: str, remedy: str, only_at: tuple[Stage, ...] = ()) -> FailureRule:
    return FailureRule(kind, Blame.PARAMETERS, pattern, remedy, only_at)


def _decided(kind: Kind, pattern: str, remedy: str, *depends: str) -> FailureRule:
    return FailureRule(kind, Blame.PARAMETERS, pattern, remedy, depends=depends)


def _study(kind: Kind, pattern: str, remedy: str, only_at: tuple[Stage, ...] = ()) -> FailureRule:
    return FailureRule(kind, Blame.STUDY, pattern, remedy, only_at)


def _environment(kind: Kind, pattern: str, remedy: str, only_at: tuple[Stage, ...] = ()) -> FailureRule:
    return FailureRule(kind, Blame.ENVIRONMENT, pattern, remedy, only_at)


_ARGUMENTS = (
    _parameters(
        Kind.BAD_ARGUMENT,
        r"error: unrecognized arguments: (?P<what>.*)",
        "The engine does not know {what}: correct its spelling or remove it.",
    ),
    _parameters(
        Kind.BAD_ARGUMENT,
        r"error: argument (?P<flag>\S+?)(?:/\S+)?: (?P<why>[^\n]{1,120})",
        "Give {flag} a value that the engine takes.",
    ),
    _parameters(
        Kind.BAD_ARGUMENT,
        r"error: (?:the following arguments are required|ambiguous option|argument|invalid|unknown argument"
        r"|expected one argument)",
        "Correct the engine's arguments.",
    ),
)

_MACHINE = (
    FailureRule(
        Kind.BAD_ARGUMENT,
        Blame.STUDY,
        r"\[Errno 99\]",
        "This machine has no such network address: correct `host`.",
        only_at=(Stage.ARGUMENTS, Stage.CONFIGURATION),
    ),
    _environment(
        Kind.PORT_IN_USE,
        r"[Aa]ddress already in use|EADDRINUSE|couldn't bind HTTP server socket",
        "Another process listens on this port: stop it or take another port.",
    ),
    FailureRule(
        Kind.DEVICE_BUSY,
        Blame.ENVIRONMENT,
        "Free " + _FREE_ON_START,
        "Only {free} of {total} GiB are free on {device}: end the other process there, or ask for less than {wanted} "
        "GiB (gpu-memory-utilization).",
        holds=_held_by_others,
    ),
    _parameters(
        Kind.OUT_OF_MEMORY,
        "Free " + _FREE_ON_START,
        "The device has {free} GiB free when nothing runs on it: set gpu-memory-utilization below {share}.",
    ),
    _parameters(
        Kind.OUT_OF_MEMORY,
        "Available " + _FREE_ON_START,
        "{wanted} GiB are asked for and {free} of {total} GiB are free: set gpu-memory-utilization below {share}.",
    ),
    _environment(
        Kind.DEVICE_BUSY,
        r"Error in memory profiling\. Initial free memory",
        "Another process freed or took device memory during the start: give the engine a device of its own.",
    ),
    _environment(
        Kind.DEVICE_BUSY,
        r"CUDA-capable device\(s\) is/are busy or unavailable|devices are busy or unavailable",
        "Another process holds the device exclusively: end it, or use another device.",
    ),
    _environment(
        Kind.WORKER_LOST,
        r"No CUDA GPUs are available|no CUDA-capable device is detected|uncorrectable (?:NVLink |ECC )?error"
        r"|GPU is lost|fallen off the bus|Unable to determine the device handle",
        "The device cannot be used: look at nvidia-smi, dmesg and CUDA_VISIBLE_DEVICES.",
    ),
)

_ONE_REQUEST = (
    r"max seq len \((?P<length>\d+)\).*?(?P<needed>[\d.]+) GiB KV cache is needed.*?"
    r"available KV cache memory \((?P<available>[\d.]+) GiB\)"
)

_MEMORY = (
    _parameters(
        Kind.KV_CACHE_TOO_SMALL,
        _ONE_REQUEST + r".*estimated maximum model length is (?P<fits>\d+)",
        "One request of {length} tokens needs {needed} GiB of KV cache, {available} GiB are there: set max-model-len "
        "to at most {fits}, or give the KV cache more memory.",
    ),
    _parameters(
        Kind.KV_CACHE_TOO_SMALL,
        _ONE_REQUEST,
        "One request of {length} tokens needs {needed} GiB of KV cache, {available} GiB are there: lower "
        "max-model-len or give the KV cache more memory.",
    ),
    _parameters(
        Kind.KV_CACHE_TOO_SMALL,
        r"max seq len \((?P<length>\d+)\) is larger than the maximum number of tokens that can be stored in KV cache "
        r"\((?P<fits>\d+)\)",
        "The KV cache holds {fits} tokens: set max-model-len to at most that, or give it more memory.",
    ),
    _parameters(
        Kind.KV_CACHE_TOO_SMALL,
        r"No available memory for the cache blocks|Cannot auto-fit max_model_len|KV cache is needed, which is larger"
        r"|Not enough memory\. Please try to increase --mem-fraction-static",
        "The model leaves no memory for the KV cache: raise gpu-memory-utilization, or lower max-num-batched-tokens "
        "and max-num-seqs.",
    ),
    _parameters(
        Kind.KV_CACHE_TOO_SMALL,
        r"max_num_seqs \((?P<seqs>\d+)\) exceeds (?:the )?available .*?blocks",
        "Lower max-num-seqs below {seqs}, or give the KV cache more memory.",
    ),
    _parameters(
        Kind.KV_CACHE_TOO_SMALL,
        r"on kv cache allocation is less than requested memory for kv \(-",
        "The share of memory that the engine may use is smaller than what it uses already: raise "
        "gpu-memory-utilization, or set kv-cache-memory-bytes.",
    ),
    _parameters(
        Kind.OUT_OF_MEMORY,
        r"Available memory on node \S+ \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on kv cache allocation is less than "
        r"requested memory for kv \((?P<wanted>[\d.]+)",
        "The KV cache asks for {wanted} GiB of {free} GiB free: lower VLLM_CPU_KVCACHE_SPACE or kv-cache-memory-bytes.",
    ),
    _parameters(
        Kind.OUT_OF_MEMORY,
        r"occurred when warming up sampler with (?P<seqs>\d+) dummy requests",
        "Lower max-num-seqs below {seqs}, or gpu-memory-utilization.",
    ),
    _parameters(
        Kind.OUT_OF_MEMORY,
        r"(?:CUDA|HIP|XPU) out of memory\. Tried to allocate (?P<wanted>[\d.]+ [KMGT]iB)",
        "The device lacked {wanted}: lower gpu-memory-utilization, max-num-seqs or max-num-batched-tokens, or use "
        "more devices.",
    ),
    _parameters(
        Kind.OUT_OF_MEMORY,
        r"OutOfMemoryError|(?:CUDA|HIP|XPU|cuBLAS|cudaMalloc)\b[^.]{0,40}out of memory|CUBLAS_STATUS_ALLOC_FAILED"
        r"|[Cc]uda failure (?:\d+ )?'out of memory'|ErrorOutOfMemory|(?:failed|unable) to allocate (?:\S+ )?buffer",
        "The device's memory is full: lower gpu-memory-utilization, max-num-seqs or max-num-batched-tokens.",
    ),
    _parameters(
        Kind.OUT_OF_MEMORY,
        r"DefaultCPUAllocator: (?:can't|not enough)|Cannot allocate memory|std::bad_alloc|^MemoryError\b"
        r"|^\S*\.MemoryError|ArrayMemoryError|failed to map segment|[Uu]nable to mmap|cannot allocate memory",
        "The machine's memory is full: lower the KV cache's size, max-num-seqs or max-num-batched-tokens.",
    ),
    _environment(
        Kind.OUT_OF_MEMORY,
        r"No space left on device.*(?:/dev/shm|shm_)|(?:/dev/shm|shm_).*No space left on device",
        "Shared memory (/dev/shm) is full: enlarge it or remove what was left there.",
    ),
)

_MODEL = (
    _study(
        Kind.MODEL_NOT_FOUND,
        r"RepositoryNotFoundError|RevisionNotFoundError|OfflineModeIsEnabled|outgoing traffic has been disabled"
        r"|HFValidationError|is not a local folder and is not a valid model identifier|404 Client Error"
        r"|is not a local folder or a valid repository name",
        "No such model here: check the name or the folder, or fetch it first (HF_HUB_OFFLINE switches the hub off).",
    ),
    _study(
        Kind.ACCESS_DENIED,
        r"GatedRepoError|gated repo|\b40[13] Client Error|Unauthorized|Invalid (?:user )?(?:token|credentials)"
        r"|awaiting a review from the repo authors",
        "Log in with a token that may read this model (HF_TOKEN), and accept its licence on its page.",
    ),
    _environment(
        Kind.MODEL_NOT_FOUND,
        r"\b(?:429|500|502|503|504) (?:Client|Server) Error|Too Many Requests|Max retries exceeded|Read timed out"
        r"|Temporary failure in name resolution|Name or service not known|Failed to resolve|Connect(?:ion)?Timeout"
        r"|ReadTimeout|check your (?:internet )?connection and try again|couldn't connect to 'http",
        "The model hub did not answer: try again, or give a local folder of the model.",
    ),
    _study(
        Kind.MODEL_NOT_FOUND,
        r"EntryNotFoundError|Cannot find an appropriate cached snapshot|couldn't find (?:it|them) in the cached files"
        r"|cannot find the requested files in the (?:disk|local) cache",
        "No such model or file here: check the name, or fetch it first (HF_HUB_OFFLINE switches the hub off).",
    ),
    _study(
        Kind.MODEL_NOT_FOUND,
        r"Cannot find any model weights|does not appear to have a file named|Error no file named|No such file or "
        r"directory: '[^']*(?:\.safetensors|\.bin|\.gguf|config\.json|tokenizer[^']*)'|Invalid repository ID or local "
        r"directory|failed to (?:open|load) GGUF",
        "The model's folder lacks files: fetch the model anew or correct its path.",
    ),
    _study(
        Kind.MODEL_NOT_FOUND,
        r"SafetensorError|InvalidHeader|MetadataIncompleteBuffer|HeaderTooLarge|PytorchStreamReader failed",
        "A weights file is damaged or cut off: fetch the model anew.",
    ),
    _study(
        Kind.MODEL_NOT_FOUND,
        r"[Cc]an't load (?:the )?tokenizer|Couldn't instantiate the backend tokenizer|Unable to load vocabulary"
        r"|Failed to load (?:the )?tokenizer",
        "The model's tokenizer is missing or damaged: fetch the model anew or set `tokenizer`.",
    ),
    _study(
        Kind.INVALID_CONFIG,
        r"is not a valid JSON file|config file at '[^']*' is not|Invalid JSON in config|Unrecognized model in",
        "The model's config.json is damaged or not a model's: fetch the model anew.",
    ),
    _study(
        Kind.UNSUPPORTED,
        r"[Mm]odel architectures? \[?.* (?:are|is) not supported|model type `[^`]*` but Transformers does not recognize"
        r"|has no vLLM implementation|unknown model architecture|Cannot find model module",
        "This engine does not serve this model's architecture: choose another model or a newer engine.",
    ),
    _study(
        Kind.ACCESS_DENIED,
        r"requires you to execute the (?:configuration|configuration file|code|tokenizer)|trust_remote_code=True"
        r"|contains custom code which must be executed",
        "The model brings its own code: set trust-remote-code in engine.args if you trust it.",
    ),
    _study(
        Kind.MODEL_NOT_FOUND,
        r"error loading model",
        "The engine cannot read this model: check its path, or fetch it anew.",
    ),
    _study(
        Kind.ACCESS_DENIED,
        r"PermissionError: \[Errno 13\]",
        "The engine may not read this file: correct its permissions.",
    ),
)

_DTYPES = ("dtype", "quantization", "load-format", "hf-overrides")
# What vLLM chooses its attention kernels by.
_ATTENTION = (
    "attention-backend",
    "attention-config",
    "env:VLLM_ATTENTION_BACKEND",
    "block-size",
    "kv-cache-dtype",
    "dtype",
    "quantization",
    "hf-overrides",
)
_PARALLEL = (
    "tensor-parallel-size",
    "pipeline-parallel-size",
    "data-parallel-size",
    "decode-context-parallel-size",
    "distributed-executor-backend",
)

_CAPABILITY = (
    _decided(
        Kind.UNSUPPORTED,
        r"Minimum capability: (?P<needed>[\d.]+)\. Current capability: (?P<has>[\w.()=, ]+)\.",
        "This quantization needs compute capability {needed}: choose another.",
        *_DTYPES,
    ),
    _decided(
        Kind.UNSUPPORTED,
        r"No common block size for (?P<size>\d+) \((?P<allowed>.*)\)",
        "The attention backend does not take block-size {size}; it takes {allowed}.",
        *_ATTENTION,
    ),
    _decided(
        Kind.UNSUPPORTED,
        r"Bfloat16 is only supported on GPUs with compute capability",
        "Set dtype to float16 (half) on this device.",
        *_DTYPES,
    ),
    _parameters(
        Kind.UNSUPPORTED,
        r"does not support float16|is not supported for quantization method",
        "Choose another dtype for this model.",
    ),
    _parameters(
        Kind.UNSUPPORTED,
        r"quantization is currently not supported in|Quantization scheme is not supported for the current GPU"
        r"|[Uu]nsupported quantization",
        "Leave this quantization out of the search space on this device.",
    ),
    _decided(
        Kind.UNSUPPORTED,
        r"[Hh]ead size (?P<size>\d+) is not supported|[Uu]nsupported head.?size|head_size not supported",
        "Choose another attention backend or dtype of the KV cache for this model's head size.",
        *_ATTENTION,
    ),
    _decided(
        Kind.UNSUPPORTED,
        r"No valid attention backend found|Selected backend \S+ is not valid for this configuration"
        r"|Invalid attention backend|share no supported KV cache block size|is not supported by attention backend"
        r"|(?:backend|kernel)s? (?:is|are) not (?:available|supported|implemented)",
        "Choose another attention backend, block-size or dtype of the KV cache.",
        *_ATTENTION,
    ),
    _parameters(
        Kind.UNSUPPORTED,
        r"OutOfResources|out of resource: shared memory",
        "A kernel needs more shared memory than this device has: choose another attention backend or block-size.",
    ),
    FailureRule(
        Kind.UNSUPPORTED,
        Blame.STUDY,
        r"No module named|ImportError|No package metadata was found|cannot open shared object file|undefined symbol"
        r"|command not found",
        "The engine is not installed, or not whole: install it anew (engine.python of the study names its Python).",
        only_at=(Stage.ARGUMENTS,),
    ),
    _study(
        Kind.UNSUPPORTED,
        r"Failed to find C compiler|Ninja is required|Could not find nvcc|nvcc: not found|fatal error: Python\.h",
        "The engine compiles kernels and lacks a compiler for it: install gcc, ninja or the CUDA toolkit.",
    ),
    _study(
        Kind.UNSUPPORTED,
        r"Failed to infer device type|CUDA driver version is insufficient|Torch not compiled with CUDA enabled"
        r"|no kernel image is available for execution",
        "The engine's build does not fit this machine's device or driver: install one that does.",
    ),
    _parameters(
        Kind.UNSUPPORTED,
        r"^NotImplementedError\b|\bis not (?:yet )?(?:supported|implemented) (?:on|for|by|in|with)\b|"
        r"\bnot yet supported\b|\bdoes(?: not|n't) support\b|\bnot supported\b|currently requires",
        "The engine cannot do this here: leave the setting out of the search space.",
    ),
)

_CONFIGURATION = (
    _parameters(
        Kind.INVALID_CONFIG,
        r"max_model_len \((?P<length>\d+)\) is greater than the derived max_model_len "
        r"\(max_position_embeddings=(?P<most>\d+)",
        "Set max-model-len to at most {most}.",
    ),
    _decided(
        Kind.INVALID_CONFIG,
        r"attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size \((?P<size>\d+)\)",
        "Set tensor-parallel-size to a divisor of {heads}.",
        *_PARALLEL,
    ),
    _parameters(
        Kind.INVALID_CONFIG,
        r"max_num_batched_tokens \((?P<tokens>\d+)\) must be greater than or equal to max_num_seqs \((?P<seqs>\d+)\)",
        'Constrain the space: "max-num-batched-tokens >= max-num-seqs" ({tokens} < {seqs}).',
    ),
    _parameters(
        Kind.INVALID_CONFIG,
        r"max_num_batched_tokens \((?P<tokens>\d+)\) is smaller than max_model_len \((?P<length>\d+)\)",
        "Set max-num-batched-tokens to at least {length}, lower max-model-len, or enable chunked prefill.",
    ),
    _decided(
        Kind.INVALID_CONFIG,
        r"World size \((?P<size>\d+)\) is larger than the number of available GPUs \((?P<gpus>\d+)\)",
        "Tensor x pipeline parallel size must be at most {gpus}, the GPUs of the trial.",
        *_PARALLEL,
    ),
    _parameters(
        Kind.INVALID_CONFIG,
        r"Duplicate GPU detected|number of required GPUs exceeds the total number of available GPUs",
        "There are fewer GPUs than workers: lower the parallel sizes.",
    ),
    _decided(
        Kind.INVALID_CONFIG,
        r"Not enough allowed NUMA nodes to bind threads of (?P<workers>\d+) local CPUWorkers",
        "Set VLLM_CPU_OMP_THREADS_BIND to cores for each of the {workers} workers, or lower the parallel sizes.",
        *_PARALLEL,
        "env:VLLM_CPU_OMP_THREADS_BIND",
    ),
    _parameters(
        Kind.INVALID_CONFIG,
        r"Unknown quantization method: (?P<name>[^\s.]+)|does not match the quantization method specified in the "
        r"`quantization` argument|Cannot find the config file for",
        "Set a quantization that this model's weights were made for, or none.",
    ),
    _parameters(
        Kind.BAD_ARGUMENT,
        r"VLLMValidationError: .*\(parameter=(?P<flag>\w+)\)",
        "Give {flag} a value that the engine takes.",
        only_at=_STARTING,
    ),
    _parameters(
        Kind.BAD_ARGUMENT,
        r"invalid literal for int\(\) with base 10: (?P<value>'[^']*')|could not convert string to float: "
        r"(?P<text>'[^']*')",
        "A value of an argument or environment variable is no number of the form the engine takes.",
        only_at=_STARTING,
    ),
    _parameters(
        Kind.INVALID_CONFIG,
        r"^(?P<field>\w+): Input should be ",
        "Correct {field}, or keep such values out of the search space.",
    ),
    _parameters(
        Kind.INVALID_CONFIG,
        r"^Value error, |\[type=\w+, input_value=|ValidationError: \d+ validation error",
        "Correct the value, or constrain the search space so that it is not drawn.",
    ),
    FailureRule(
        Kind.INVALID_CONFIG,
        Blame.PARAMETERS,
        r"^(?:ValueError|TypeError|AssertionError|KeyError)\b",
        "Correct the value, or constrain the search space so that it is not drawn.",
        only_at=(Stage.CONFIGURATION,),
        within="in create_engine_config",
    ),
)

_DEATHS = (
    FailureRule(
        Kind.WORKER_LOST,
        Blame.ENVIRONMENT,
        r"ncclSystemError|ncclRemoteError|ncclInternalError|NCCL error|NCCL timeout|ProcessGroupNCCL|Watchdog caught "
        r"collective operation timeout|DistNetworkError|DistBackendError|RayActorError|ActorDiedError|NodeDiedError"
        r"|[Cc]onnection (?:closed|reset) by (?:remote )?peer|[Nn]ode .* (?:died|was lost)",
        "A worker or the connection to it was lost: look at the other workers' lines, then at the network "
        "(NCCL_DEBUG=INFO).",
        follows=True,
    ),
    _parameters(
        Kind.WORKER_LOST,
        r"Worker proc \S+ died unexpectedly \(exit code: (?:-9|None)\)",
        f"A worker was killed, most often by the kernel for memory: {_SPARE}, and look at dmesg.",
    ),
    _parameters(
        Kind.WORKER_LOST,
        r"Worker proc \S+ died unexpectedly \(exit code: -7\)",
        "A worker ended with SIGBUS, most often for a full /dev/shm: enlarge it.",
    ),
    _parameters(
        Kind.WORKER_LOST,
        r"Worker proc \S+ died unexpectedly \(exit code: (?P<code>[-\w]+)\)|RayWorkerProc rank=\S+ died unexpectedly",
        "A worker ended by itself: leave the setting out, and look at the engine's lines just before.",
    ),
    _parameters(
        Kind.ENGINE_DIED,
        r"Engine core proc \S+ died unexpectedly|engine core exited unexpectedly|EngineDeadError|EngineCore encountered"
        r"|EngineCore failed to start|output_handler failed|illegal memory access|device-side assert"
        r"|unspecified launch failure|misaligned address|Segmentation fault|Fatal Python error",
        "The engine crashed under this setting: leave it out, or report it to the engine's makers.",
    ),
    _parameters(
        Kind.HUNG,
        r"Timed out waiting for engine core processes to start|RPC call to \S+ timed out|TimeoutError: RPC call",
        "The engine did not answer in its own time limit: lengthen it, or leave the setting out.",
    ),
    _environment(
        Kind.UNKNOWN,
        r"No space left on device|Disk quota exceeded",
        "The disk is full: make room for the engine's caches and the results.",
    ),
    _environment(
        Kind.UNKNOWN,
        r"Too many open files|can't start new thread|Resource temporarily unavailable",
        "The machine's limit of files or threads is reached: raise it (ulimit -n, -u).",
    ),
)

VLLM_RULES = LogRules(
    stages=tuple(sorted(_VLLM_STAGES + _OTHER_STAGES, key=lambda rule: rule.stage.order)),
    shares={Stage.WEIGHTS: r"(\d{1,3})% Completed", Stage.GRAPH_CAPTURE: r"(\d{1,3})%\|"},
    failures=_ARGUMENTS + _MACHINE + _MEMORY + _MODEL + _CAPABILITY + _CONFIGURATION + _DEATHS,
    echoes=(
        r"See root cause above|[Ss]ee stack trace (?:\(?above\)? )?for (?:the )?root cause|check the stack trace above"
        r"|WorkerProc initialization failed|^RuntimeError: (?:Executor failed|cancelled)|EngineDeadError"
        r"|EngineCore encountered|EngineCore failed to start|output_handler failed|WorkerProc failed|WorkerProc hit"
    ),
    fatal=(
        r"EngineCore failed to start|EngineCore encountered a fatal error|Engine (?:core initialization|process) failed"
        r"|(?:died|exited) unexpectedly|WorkerProc failed to start|WorkerProc initialization failed|EngineDeadError"
        r"|AsyncLLM output_handler failed|^[\w.-]+(?: serve)?: error: |terminate called after throwing"
        r"|Fatal Python error|error while attempting to bind|Received sigquit from a child process"
        r"|exiting due to model loading error"
    ),
    lone=(
        r"^[\w./-]+(?: serve)?: error: |^[Ee]rror: |(?:died|exited) unexpectedly|terminate called after throwing"
        r"|\[Errno \d+\] error while|error loading model|^Fatal Python error|Segmentation fault|cudaMalloc failed"
        r"|Bus error|^(?:\S+|/[^:]*): (?:No module named |Error while finding module specification for )"
        r"|command not found|couldn't bind HTTP server socket|failed to allocate (?:\S+ )?buffer"
    ),
    harmless=(
        r"Exception in ASGI application|Exception ignored in|exception was never retrieved|Exception in callback"
        r"|Unexpected error pre-processing request|Invocation of \S+ method failed|Error in preprocessing prompt"
        r"|Error saving model info cache|Exception during depyf cleanup|Error in .* stream"
    ),
    shutdown=(
        r"received signal=?\s*SIG(?:TERM|INT)|trigger received signal|API server: shutdown triggered"
        r"|^INFO: +Shutting down|^KeyboardInterrupt\b|^SystemExit\b|Received SIG(?:TERM|INT)|Terminated$"
    ),
    launch=r"non-default args:|^[\w.-]+(?: serve)?: error: (?:unrecognized arguments|argument -|the following arg)",
    spare=_SPARE,
)
"""vLLM's log, with the common lines of SGLang and llama.cpp."""

SIMULATED_RULES = VLLM_RULES
"""The simulated engine writes vLLM's lines."""

# Servers of which nothing is known: they are Python, C++, Rust or Go, and mostly have the words of their libraries.

_ANY_STAGES = (
    StageRule(Stage.WEIGHTS, "oading weights"),
    StageRule(Stage.WEIGHTS, "oading model"),
    StageRule(Stage.READY, "Uvicorn running on"),
    StageRule(Stage.READY, "istening on"),
)

_ANY_FAILURES = (
    _parameters(
        Kind.BAD_ARGUMENT,
        r"(?:[Nn]o such option|[Uu]n(?:known|recognized) (?:option|argument|flag)|unexpected argument|invalid argument"
        r"|flag provided but not defined):? ?['\"`]?(?P<flag>-{1,2}[\w.-]+)",
        "The program does not know {flag}: correct its spelling, or leave it out.",
    ),
    _parameters(
        Kind.BAD_ARGUMENT,
        r"[Ii]nvalid value (?:'[^']*' )?for '?(?P<flag>-{1,2}[\w-]+)",
        "Give {flag} a value that the program takes.",
    ),
    _parameters(
        Kind.OUT_OF_MEMORY,
        r"OutOfMemoryError|(?:CUDA|HIP|XPU|MPS|Metal|cudaMalloc|hipMalloc)\b[^.]{0,40}out of memory"
        r"|ErrorOutOf(?:Device)?Memory|CUBLAS_STATUS_ALLOC_FAILED|(?:failed|unable) to allocate (?:\S+ )?buffer",
        "The device's memory is full: lower what the setting holds there, such as context, batch or requests at once.",
    ),
    _parameters(
        Kind.OUT_OF_MEMORY,
        r"DefaultCPUAllocator: (?:can't|not enough)|[Cc]annot allocate memory|std::bad_alloc|^\S*MemoryError\b"
        r"|memory allocation of \d+ bytes failed",
        "The machine's memory is full: lower what the setting holds, such as context, batch or requests at once.",
    ),
)

ANY_RULES = replace(
    VLLM_RULES,
    stages=tuple(sorted(_ANY_STAGES + VLLM_RULES.stages, key=lambda rule: rule.stage.order)),
    shares={Stage.WEIGHTS: r"(\d{1,3})%(?: Completed|\|)", Stage.GRAPH_CAPTURE: r"(\d{1,3})%\|"},
    failures=_ANY_FAILURES + VLLM_RULES.failures,
    spare="lower what the setting holds, such as context, batch or requests at once",
    lone=rf"{VLLM_RULES.lone}|[Nn]o such option|[Ii]nvalid value |flag provided but not defined"
    r"|^[A-Za-z_][\w.]*(?:Error|Exception)\b: |memory allocation of \d+ bytes failed"
    r"|[Aa]ddress already in use(?!.*\b(?:re)?trying)",
)
"""The log of a program that is not known: its last exception, the errors of common argument parsers, memory, ports."""
