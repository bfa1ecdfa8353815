"""config.json as transformers 4 and 5 write it, what is refused, and which layouts fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from sdpg_megatron.architecture import Experts, check_lengths, check_model, check_parallel, read_architecture
from sdpg_megatron.config import ModelConfig, ParallelConfig
from sdpg_megatron.config.load import parse
from sdpg_megatron.errors import ConfigError

SIZES = {
    "num_hidden_layers": 6,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(folder: Path, **changes: Any) -> Path:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "family", "bias", "norm"),
    [(LlamaConfig, "llama", False, False), (Qwen2Config, "qwen2", True, False), (Qwen3Config, "qwen3", False, True)],
)
def test_reads_what_transformers_saves(tmp_path: Path, kind: Any, family: str, bias: bool, norm: bool) -> None:
    kind(**SIZES, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5e5}).save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    assert (arch.family, arch.qkv_bias, arch.qk_norm) == (family, bias, norm)
    assert (arch.num_layers, arch.hidden_size, arch.ffn_size) == (6, 96, 160)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim) == (12, 4, 16)
    assert (arch.vocab_size, arch.max_positions, arch.tied_embeddings) == (300, 512, True)
    assert (arch.rms_eps, arch.rope_theta, arch.rope_scaling) == (1e-6, 5e5, None)


def test_reads_mixtures_of_experts_that_transformers_saves(tmp_path: Path) -> None:
    routed = {"num_experts_per_tok": 3, "head_dim": 16}
    Qwen3MoeConfig(**SIZES, **routed, num_experts=8, moe_intermediate_size=40).save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    assert (arch.family, arch.qk_norm, arch.ffn_size) == ("qwen3_moe", True, 40)
    assert arch.experts == Experts(count=8, per_token=3, normalized=False)
    MixtralConfig(**SIZES, **routed, num_local_experts=8).save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    assert (arch.family, arch.qk_norm, arch.ffn_size, arch.rope_theta) == ("mixtral", False, 160, 1e6)
    assert arch.experts == Experts(count=8, per_token=3, normalized=True)


MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "mlp_only_layers": None,
}
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def test_reads_mixtures_of_experts_of_transformers_4(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path, **MOE))
    assert (arch.head_dim, arch.rope_theta, arch.rms_eps) == (8, 10000.0, 1e-6)
    assert arch.experts == Experts(count=8, per_token=2, normalized=True)
    arch = read_architecture(write(tmp_path, **MIXTRAL))
    assert (arch.head_dim, arch.rope_theta, arch.rms_eps) == (8, 1e6, 1e-5)
    single = read_architecture(write(tmp_path, **{**MOE, "num_experts_per_tok": 1, "norm_topk_prob": False}))
    assert single.experts == Experts(count=8, per_token=1, normalized=False)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({**MOE, "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({**MOE, "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({**MOE, "n_shared_experts": 1}, "n_shared_experts"),
        ({**MOE, "shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ({**MOE, "num_experts": None}, "num_experts"),
        ({**MOE, "num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({**MOE, "num_experts_per_tok": 1}, "num_experts_per_tok"),
        ({**MOE, "moe_intermediate_size": None}, "moe_intermediate_size"),
        ({**MIXTRAL, "num_experts_per_tok": 1}, "num_experts_per_tok"),
        ({**MIXTRAL, "router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({**MIXTRAL, "sliding_window": 256}, "sliding_window"),
    ],
)
def test_refuses_mixtures_of_experts_by_name(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {key}: found .*expected .*Fix: "):
        read_architecture(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"expert": 3}, r"parallel\.expert: found 3, .*8 experts of a layer.*one of: 1, 2, 4, 8$"),
        ({"expert_tensor": 3}, r"parallel\.expert_tensor: found 3, .*40 feed-forward columns"),
        ({"tensor": 4}, r"parallel\.sequence: found False, expected true"),
    ],
)
def test_layouts_of_experts_that_do_not_fit(tmp_path: Path, parallel: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parallel(read_architecture(write(tmp_path, **MOE)), ParallelConfig(**parallel))


@pytest.mark.parametrize("parallel", [{"expert": 4}, {"tensor": 4, "sequence": True, "expert": 2, "pipeline": 3}])
def test_layouts_of_experts_that_fit(tmp_path: Path, parallel: dict[str, Any]) -> None:
    check_parallel(read_architecture(write(tmp_path, **MOE)), ParallelConfig(**parallel))


@pytest.mark.parametrize("parallel", [{"expert": 2}, {"expert_tensor": 1}, {"dispatcher": "allgather"}])
def test_dense_models_have_no_experts_to_share(tmp_path: Path, parallel: dict[str, Any]) -> None:
    (field,) = parallel
    with pytest.raises(ConfigError, match=rf"^parallel\.{field}: found .* with a dense model \(llama\)"):
        check_parallel(read_architecture(write(tmp_path)), ParallelConfig(**parallel))


def test_dense_models_have_no_routing_to_replay(tmp_path: Path) -> None:
    model = ModelConfig(path=tmp_path)
    with pytest.raises(ConfigError, match=r"^rollout\.replay_routing: found True, expected false with a dense model"):
        check_model(read_architecture(write(tmp_path)), model, replay_routing=True)
    check_model(read_architecture(write(tmp_path, **MOE)), model, replay_routing=True)


def test_fused_gradients_need_their_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, model = read_architecture(write(tmp_path)), ModelConfig(path=tmp_path, gradient_accumulation_fusion=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^model\.gradient_accumulation_fusion: found True, .*Fix: install apex"):
        check_model(arch, model)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "fused_weight_gradient_mlp_cuda" or None)
    check_model(arch, model)


@pytest.mark.parametrize("field", ["router_aux_loss", "router_z_loss"])
def test_dense_models_have_no_routers_to_train(tmp_path: Path, field: str) -> None:
    model = ModelConfig(path=tmp_path, **{field: 0.01})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^model\.{field}: found 0.01, expected 0 with a dense model \(llama\)"):
        check_model(read_architecture(write(tmp_path)), model)
    check_model(read_architecture(write(tmp_path, **MOE)), model)


def test_reads_rope_of_both_generations(tmp_path: Path) -> None:
    old = read_architecture(write(tmp_path, rope_theta=7e4, rope_scaling=LLAMA3))
    new = read_architecture(write(tmp_path, rope_parameters={**LLAMA3, "rope_theta": 7e4}))
    assert old == new
    assert old.rope_theta == 7e4
    assert old.rope_scaling == 8.0


def test_scales_of_one_are_no_scales(tmp_path: Path) -> None:
    changes = {"logits_scaling": 1.0, "logit_scale": None, "final_logit_softcapping": None, "scale_emb": 1}
    assert read_architecture(write(tmp_path, **changes)) == read_architecture(write(tmp_path))


def test_defaults_of_old_files(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path, rope_scaling=None))
    assert (arch.head_dim, arch.rope_theta, arch.rope_scaling) == (8, 10000.0, None)
    qwen = read_architecture(write(tmp_path, model_type="qwen3", architectures=["Qwen3ForCausalLM"]))
    assert qwen.head_dim == 128


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "qwen2_moe"}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"logit_scale": 0.0625}, "logit_scale"),
        ({"scale_emb": 12}, "scale_emb"),
        ({"logit_bias": [0.5]}, "logit_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor"),
        ({"num_key_value_heads": None}, "num_key_value_heads"),
        ({"vocab_size": "300"}, "vocab_size"),
    ],
)
def test_refuses_by_name(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {key}: found .*expected .*Fix: "):
        read_architecture(write(tmp_path, **changes))


def test_a_model_that_is_too_short_is_refused(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path))
    tree = {"run_dir": "r", "steps": 8, "model": {"path": "m"}, "data": {"train": [], "max_prompt_tokens": 500}}
    check_lengths(arch, parse({**tree, "optimizer": {"warmup_steps": 0}, "rollout": {"max_response_tokens": 12}}))
    with pytest.raises(ConfigError, match=r"found '500 \+ 13', expected at most the model's 512 positions"):
        check_lengths(arch, parse({**tree, "optimizer": {"warmup_steps": 0}, "rollout": {"max_response_tokens": 13}}))
    with pytest.raises(ConfigError, match=r"data\.max_peer_tokens"):
        check_lengths(
            arch,
            parse(
                {
                    **tree,
                    "optimizer": {"warmup_steps": 0},
                    "objective": {"name": "sdpo"},
                    "rollout": {"max_response_tokens": 12},
                }
            ),
        )


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_architecture(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json.*JSON"):
            read_architecture(tmp_path)


@pytest.mark.parametrize(("tensor", "rows"), [(1, 384), (2, 512), (3, 384), (4, 512)])
def test_padded_vocabulary(tmp_path: Path, tensor: int, rows: int) -> None:
    assert read_architecture(write(tmp_path)).padded_vocab(tensor) == rows


def test_padded_vocabulary_of_a_full_multiple(tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path, vocab_size=256)).padded_vocab(2) == 256
    assert read_architecture(write(tmp_path, vocab_size=256)).padded_vocab(1, multiple=100) == 300


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tensor": 5}, r"parallel\.tensor: found 5, .*12 attention heads.*one of: 1, 2, 4$"),
        ({"tensor": 3}, r"parallel\.tensor: found 3, .*4 key-value heads.*one of: 1, 2, 4$"),
        ({"tensor": 6}, r"parallel\.tensor: found 6, .*4 key-value heads"),
        ({"pipeline": 4}, r"parallel\.pipeline: found 4, .*6 layers.*one of: 1, 2, 3, 6$"),
        ({"pipeline": 12}, r"parallel\.pipeline: found 12, .*6 layers"),
        ({"pipeline": 2, "virtual_pipeline": 2}, r"virtual_pipeline: found 2, .*3 layers of each.*one of: 3$"),
        ({"pipeline": 6, "virtual_pipeline": 2}, r"virtual_pipeline: found 2, .*1 layers of each.*one of: null$"),
    ],
)
def test_layouts_that_do_not_fit(tmp_path: Path, parallel: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parallel(read_architecture(write(tmp_path)), ParallelConfig(**parallel))


def test_feed_forward_must_divide(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"162 feed-forward columns.*one of: 1, 2$"):
        check_parallel(read_architecture(write(tmp_path, intermediate_size=162)), ParallelConfig(tensor=4))


@pytest.mark.parametrize("parallel", [{"tensor": 4, "pipeline": 6}, {"pipeline": 2, "virtual_pipeline": 3}, {}])
def test_layouts_that_fit(tmp_path: Path, parallel: dict[str, int]) -> None:
    check_parallel(read_architecture(write(tmp_path)), ParallelConfig(**parallel))
