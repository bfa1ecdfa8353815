"""Tiny random Hugging Face models with a real tokenizer: what the tests run on instead of a download."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.weights import hf_shapes

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"]

PAD, BOS, EOS, TURN_START, TURN_END = "<|endoftext|>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"
# The padding token has the name that the Qwen2 tokenizer class would otherwise add beyond the vocabulary.
SPECIAL = (PAD, BOS, EOS, TURN_START, TURN_END)
VOCAB = 300
"""256 bytes, 5 special tokens, the rest merges; not a multiple of 128, so that vocabulary padding is exercised."""
QWEN3_HEAD_DIM = 32
"""Differs from hidden / heads, as in the released Qwen3 models."""
EXPERTS, EXPERTS_PER_TOKEN = 4, 2
"""Of each layer of a mixture of experts. An expert has half as many columns as hidden states."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "What is 12 + 34? Reply with only the number.",
    "The correct answer to this problem is: 46",
    "system user assistant You are a helpful assistant.",
)


def tiny_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `vocab` tokens that knows every string, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == vocab, f"{tokenizer.get_vocab_size()} tokens, wanted {vocab}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    family: Family,
    *,
    tied: bool,
    seed: int,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = VOCAB,
    normalized: bool = True,
) -> PreTrainedModel:
    """A random float32 model in eval mode. No parameter is constant: norm scales and biases are drawn too.

    `normalized`: Qwen3-MoE's norm_topk_prob. The global random state is left as it was.
    """
    shape = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        match family:
            case "llama":
                model = LlamaForCausalLM(LlamaConfig(**shape, head_dim=hidden // heads))
            case "qwen2":
                model = Qwen2ForCausalLM(Qwen2Config(**shape))
            case "qwen3":
                model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=QWEN3_HEAD_DIM))
            case "qwen3_moe":
                shape |= {"moe_intermediate_size": hidden // 2, "head_dim": QWEN3_HEAD_DIM}
                shape |= {"num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN}
                model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, norm_topk_prob=normalized))
            case "mixtral":
                shape |= {"num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN}
                model = MixtralForCausalLM(MixtralConfig(**(shape | {"intermediate_size": hidden // 2})))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_tiny_model(folder: Path, family: Family, *, vocab: int = VOCAB, **options: Any) -> Path:
    """Write a `tiny_model` with its tokenizer and generation config (two stop ids) to `folder`, and return `folder`.

    `options`: as of `tiny_model`, which needs `tied` and `seed`.
    """
    tokenizer = tiny_tokenizer(vocab)
    model = tiny_model(family, vocab=vocab, **options)
    stop_ids = tokenizer.convert_tokens_to_ids([EOS, TURN_END])
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0, eos_token_id=stop_ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_hollow_weights(folder: Path, shard_bytes: int = 4 * 2**30) -> None:
    """Write safetensors files with every tensor of a folder's config.json: true headers, and holes for the values."""
    shards: list[dict[str, Any]] = []
    end = shard_bytes
    for name, shape in hf_shapes(read_architecture(folder)).items():
        if end + 2 * math.prod(shape) > shard_bytes:
            shards.append({})
            end = 0
        start, end = end, end + 2 * math.prod(shape)
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    for number, header in enumerate(shards):
        text = json.dumps(header).encode()
        size = max(tensor["data_offsets"][1] for tensor in header.values())
        with (folder / f"{number}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
    weight_map = {name: f"{number}.safetensors" for number, header in enumerate(shards) for name in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def add_sampling_defaults(folder: Path) -> None:
    """Give a model folder sampling defaults, as released models have; these leave only the most probable token."""
    path = folder / "generation_config.json"
    defaults = {"do_sample": True, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "temperature": 0.2, "repetition_penalty": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | defaults))
