"""What a model needs of memory, against the known sizes of known models; what is refused for it, and what never is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.engine import memory, models
from raytune_autotuner.engine.memory import GIB, Demand, Tensor, Weights
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage

# Of the models' own config.json: the keys that tell their shape.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
QWEN = LLAMA | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "sliding_window": None,
    "vocab_size": 32000,
}
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
SMOLLM = LLAMA | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "parameters", "kv_bytes"),
    [
        pytest.param(LLAMA, 8_030_261_248, 32 * 2 * 8 * 128 * 2, id="Llama-3.1-8B"),
        pytest.param(QWEN, 7_615_616_512, 28 * 2 * 4 * 128 * 2, id="Qwen2.5-7B"),
        pytest.param(MIXTRAL, 46_702_792_704, 32 * 2 * 8 * 128 * 2, id="Mixtral-8x7B"),
        pytest.param(DEEPSEEK, 15_706_484_224, 27 * (512 + 64) * 2, id="DeepSeek-V2-Lite"),
        pytest.param(SMOLLM, 134_515_008, 30 * 2 * 3 * 64 * 2, id="SmolLM2-135M"),
    ],
)
def test_the_sizes_of_known_models_are_met(config: dict[str, Any], parameters: int, kv_bytes: int) -> None:
    weights = memory.counted_weights(config)
    assert weights is not None
    assert weights.size(2) == pytest.approx(2 * parameters, rel=0.03)
    assert weights.size(2) <= 2 * parameters, "an estimate that refuses must not be too high"
    assert memory.kv_bytes_per_token(config) == kv_bytes


def test_devices_share_heads_but_not_a_latent_vector() -> None:
    assert memory.kv_bytes_per_token(LLAMA, tensor_parallel=4) == 131072 / 4
    assert memory.kv_bytes_per_token(LLAMA, tensor_parallel=16) == 131072 / 8, "each holds one head at the least"
    assert memory.kv_bytes_per_token(DEEPSEEK, tensor_parallel=4) == memory.kv_bytes_per_token(DEEPSEEK)


@pytest.mark.parametrize(
    ("change", "parameters"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, 8_030_261_248),
        ({"quantization_config": {"quant_method": "fp8"}}, 8_030_261_248),
    ],
)
def test_a_quantised_checkpoint_needs_less_and_still_its_embeddings(change: dict[str, Any], parameters: int) -> None:
    weights = memory.counted_weights(LLAMA | change)
    assert weights is not None
    assert 2 * 2 * 128256 * 4096 < weights.size(2) < 1.3 * parameters


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "jamba"},
        {"architectures": ["LlamaModel"]},
        {"is_causal": False},
        {"hidden_size": None},
        {"model_type": "qwen3"},  # whose heads have a size of their own, which is not told here
        {"model_type": "llama", "num_key_value_heads": "8"},
    ],
    ids=str,
)
def test_nothing_is_reckoned_for_a_shape_that_is_not_known(change: dict[str, Any]) -> None:
    config = LLAMA | change
    assert memory.counted_weights(config) is None
    assert memory.kv_bytes_per_token(config) is None
    need = memory.demand(config, None, {"max-model-len": 10**9, "max-num-seqs": 4096, "max-num-batched-tokens": 10**6})
    assert (need.weights, need.kv_cache, need.activations) == (0, 0, 0)


def test_a_head_of_no_size_has_no_kv_cache_that_is_known() -> None:
    assert memory.kv_bytes_per_token(LLAMA | {"hidden_size": 7}) is None


def test_a_quantisation_that_is_not_known_has_no_size() -> None:
    assert memory.counted_weights(LLAMA | {"quantization_config": {"quant_method": "strange"}}) is None


IN_FORCE = {"max-model-len": 8192, "dtype": "bfloat16", "kv-cache-dtype": "auto", "gpu-memory-utilization": 0.9}


def need_of(config: dict[str, Any], **setting: Any) -> Demand:
    given = {name.replace("_", "-"): value for name, value in setting.items()}
    return memory.demand(config, memory.counted_weights(config), IN_FORCE | given)


def test_a_demand_is_that_of_one_device() -> None:
    alone = need_of(LLAMA)
    assert alone.kv_cache == 8192 * 131072
    for sizes in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        shared = need_of(LLAMA, **sizes)
        assert (shared.weights, shared.kv_cache) == (alone.weights / 2, alone.kv_cache / 2)
    assert need_of(LLAMA, decode_context_parallel_size=4).kv_cache == alone.kv_cache / 4
    assert need_of(LLAMA, data_parallel_size=2) == alone
    assert need_of(MIXTRAL, data_parallel_size=2).weights == need_of(MIXTRAL).weights / 2, "experts are spread"


@pytest.mark.parametrize(
    ("kv_cache_dtype", "share"),
    [("auto", 1), ("bfloat16", 1), ("fp8", 1 / 2), ("fp8_e5m2", 1 / 2), ("int8_per_token_head", 1 / 2)],
)
def test_the_kv_cache_has_its_own_dtype(kv_cache_dtype: str, share: float) -> None:
    assert need_of(LLAMA, kv_cache_dtype=kv_cache_dtype).kv_cache == 8192 * 131072 * share
    assert need_of(LLAMA, kv_cache_dtype="turboquant_3bit_nc").kv_cache < 8192 * 131072 / 4


def test_float32_doubles_weights_and_kv_cache() -> None:
    plain, wide = need_of(LLAMA), need_of(LLAMA, dtype="float32")
    assert (wide.weights, wide.kv_cache) == (2 * plain.weights, 2 * plain.kv_cache)


def test_layers_with_a_sliding_window_hold_the_window_only() -> None:
    windowed = LLAMA | {"model_type": "mistral", "sliding_window": 4096}
    assert need_of(windowed).kv_cache == 4096 * 131072
    kinds = ["full_attention"] * 8 + ["sliding_attention"] * 24
    assert need_of(windowed | {"layer_types": kinds}).kv_cache == (8 * 8192 + 24 * 4096) * 131072 / 32
    assert need_of(QWEN | {"sliding_window": 16}).kv_cache == 8192 * 57344, "it has one, and does not use it"


@pytest.mark.parametrize(
    ("name", "value"),
    [("cpu-offload-gb", 4), ("hf-overrides", {"num_hidden_layers": 2}), ("load-format", "bitsandbytes"), ("runner", 1)],
)
def test_nothing_is_reckoned_for_a_setting_that_changes_the_model(name: str, value: Any) -> None:
    need = memory.demand(LLAMA, Weights(10**12), {**IN_FORCE, name: value})
    assert (need.weights, need.kv_cache, need.activations) == (0, 0, 0)


def test_weights_that_are_quantised_while_they_are_loaded_count_as_four_bits() -> None:
    assert memory.demand(LLAMA, Weights(1000), {"quantization": "fp8"}).weights == 500


def refused(need: Demand, gib: float | None, on_cpu: bool = False, **setting: Any) -> Failure | None:
    given = {name.replace("_", "-"): value for name, value in setting.items()}
    return memory.shortage(need, IN_FORCE | given, None if gib is None else gib * GIB, on_cpu=on_cpu)


NEED = Demand(weights=15 * GIB, kv_cache=2 * GIB, activations=0.5 * GIB, max_model_len=8192)


def test_what_cannot_fit_is_refused_by_how_much() -> None:
    failure = refused(NEED, 20, gpu_memory_utilization=0.6)
    assert failure is not None
    assert (failure.stage, failure.kind, failure.blame) == (Stage.KV_CACHE, Kind.KV_CACHE_TOO_SMALL, Blame.PARAMETERS)
    assert failure.evidence == (
        "weights 15.0 GiB + KV cache for one request of 8192 tokens 2.0 GiB + activations 0.50 GiB do not fit in "
        "12.0 GiB: 5.5 GiB over"
    )


def test_weights_alone_that_are_too_much_fail_while_they_are_loaded() -> None:
    failure = refused(NEED, 12)
    assert failure is not None
    assert (failure.stage, failure.kind) == (Stage.WEIGHTS, Kind.OUT_OF_MEMORY)
    assert failure.evidence == "weights 15.0 GiB do not fit in 12.0 GiB: 3.0 GiB over"


def test_a_kv_cache_of_a_given_size_must_hold_one_request_and_fit_beside_the_weights() -> None:
    small = refused(NEED, None, kv_cache_memory_bytes=GIB)
    assert small is not None
    assert small.evidence == "KV cache for one request of 8192 tokens 2.0 GiB does not fit in 1.0 GiB: 1.0 GiB over"
    assert small.stage is Stage.KV_CACHE
    large = refused(NEED, 80, kv_cache_memory_bytes=70 * GIB)
    assert large is not None
    assert (large.stage, large.kind) == (Stage.KV_CACHE, Kind.OUT_OF_MEMORY)
    assert large.evidence == "weights 15.0 GiB + KV cache 70.0 GiB do not fit in 80.0 GiB: 5.0 GiB over"
    assert refused(NEED, 80, kv_cache_memory_bytes=60 * GIB) is None


def test_workers_on_a_cpu_share_the_machine() -> None:
    half = Demand(7.5 * GIB, 1 * GIB, 0, 8192)
    settings = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 4 * GIB}
    assert refused(half, 24, on_cpu=True, **settings) is None
    failure = refused(half, 22, on_cpu=True, **settings)
    assert failure is not None
    assert "weights 15.0 GiB + KV cache 8.0 GiB do not fit in 22.0 GiB: 1.0 GiB over" in failure.evidence


@pytest.mark.parametrize("gib", [None, 20, 24, 80])
def test_what_may_fit_is_not_refused(gib: float | None) -> None:
    assert refused(NEED, gib) is None
    assert refused(Demand(0, 0, 0), gib) is None


def write_weights(file: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    """A safetensors file of headers alone."""
    header, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at := at + size]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)


def test_weights_are_read_from_the_headers_of_their_files(tmp_path: Path) -> None:
    write_weights(tmp_path / "model-1.safetensors", {"model.layers.0.up.weight": ("BF16", [100, 10], 2000)})
    write_weights(
        tmp_path / "model-2.safetensors",
        {
            "lm_head.weight": ("BF16", [50, 10], 1000),
            "model.layers.1.down.weight": ("F32", [10], 40),
            "model.layers.2.down.weight": ("F32", [10], 40),  # more layers than the model has
            "model.layers.1.down.weight_packed": ("I32", [5], 20),
            "vision_tower.up.weight": ("BF16", [10**6], 2 * 10**6),
        },
    )
    write_weights(tmp_path / "consolidated.safetensors", {"everything": ("BF16", [10**6], 2 * 10**6)})
    tensors = models.stored_tensors(tmp_path)
    assert Tensor("model.layers.0.up.weight", "BF16", 1000, 2000) in tensors
    config = {"num_hidden_layers": 2}
    assert memory.stored_weights(config | {"tie_word_embeddings": True}, tensors) == Weights(1010, 20)
    assert memory.stored_weights(config | {"tie_word_embeddings": False}, tensors) == Weights(1510, 20)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x03\0\0\0\0\0\0\0{}x"])
def test_damaged_weights_tell_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert models.stored_tensors(tmp_path) == ()


def test_a_folder_with_missing_shards_tells_nothing(tmp_path: Path) -> None:
    write_weights(tmp_path / "model-1.safetensors", {"up.weight": ("BF16", [10], 20)})
    index = {"weight_map": {"up.weight": "model-1.safetensors", "down.weight": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert models.stored_tensors(tmp_path) == ()
    write_weights(tmp_path / "model-2.safetensors", {"down.weight": ("BF16", [10], 20)})
    assert len(models.stored_tensors(tmp_path)) == 2


def test_a_hub_model_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert models.local_folder("org/name") is None
    kept = tmp_path / "models--org--name"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc123")
    assert models.local_folder("org/name") is None
    snapshot = kept / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert models.local_folder("org/name") == snapshot
    assert models.local_folder(str(snapshot)) == snapshot


@pytest.mark.parametrize(
    "config", [{"num_experts": 8}, {"text_config": {"n_routed_experts": 64}}, {"moe_num_experts": 2}]
)
def test_a_mixture_of_experts_is_known_by_its_counts(config: dict[str, Any]) -> None:
    assert memory.mixes_experts(config)
    assert not memory.mixes_experts({"num_experts": 0, "num_experts_per_tok": 1, "num_local_experts": None})


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": 5},
        {"sliding_window": "x"},
        {"num_experts": [8]},
        {"n_routed_experts": "many"},
        {"num_experts": 8, "decoder_sparse_step": "x"},
        {"text_config": LLAMA | {"head_dim": "x"}},
        {"num_hidden_layers": "x"},
    ],
    ids=str,
)
def test_values_of_a_wrong_type_in_a_config_are_no_trouble(change: dict[str, Any]) -> None:
    config = LLAMA | change
    stored = memory.stored_weights(config, [memory.Tensor("model.layers.1.w", "BF16", 10, 20)])
    setting = {"max-model-len": 4096, "max-num-seqs": 64, "max-num-batched-tokens": 64}
    for weights in (stored, memory.counted_weights(config)):
        assert memory.demand(config, weights, setting).weights <= 17 * memory.GIB
