"""Make models to measure with: realistic shapes and random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from respec_trainer.compat.torchvision_cpu import define_torchvision_operators

# 76M parameters: both the matrix products and all other work take a noticeable part of the time.
MID = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}

# 2.6M parameters, the quickstart's actor: work other than matrix products takes nearly all of the time.
SMALL = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}

SHAPES = {"mid": MID, "small": SMALL}


def make_target(folder: Path, shape: dict[str, int]) -> Path:
    """Write a Qwen3 of this shape with random weights, in bf16, as a Hugging Face folder without a tokenizer."""
    define_torchvision_operators()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**shape, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_drafter(folder: Path, shape: dict[str, int], seed: int = 0) -> Path:
    """Write an EAGLE-3 drafter for `make_target`'s model: random weights, sglang's format, the full vocabulary.

    Its drafts are accepted by chance only; benchmarks simulate acceptance.
    """
    hidden, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads, kv_heads = (shape[key] * shape["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    generator = torch.Generator().manual_seed(seed)
    matrices = {
        "fc": (hidden, 3 * hidden),
        "midlayer.self_attn.q_proj": (heads, 2 * hidden),
        "midlayer.self_attn.k_proj": (kv_heads, 2 * hidden),
        "midlayer.self_attn.v_proj": (kv_heads, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, heads),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
        "lm_head": (vocabulary, hidden),
    }
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
    weights = {
        f"{name}.weight": (torch.randn(size, generator=generator) * size[1] ** -0.5).to(torch.bfloat16)
        for name, size in matrices.items()
    }
    weights |= {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
    weights |= {"d2t": torch.zeros(vocabulary, dtype=torch.int64), "t2d": torch.ones(vocabulary, dtype=torch.bool)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    layers = shape["num_hidden_layers"]
    config = {
        **shape,
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [0, layers // 2, layers - 2],
            "use_aux_hidden_state": True,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
