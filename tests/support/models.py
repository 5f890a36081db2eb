"""Tiny Hugging Face models with random weights, for tests."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.config import Config


def tiny_config(family: str, tied: bool = False, vocab_size: int = 131, layers: int = 2, **changes):
    """A config of a family, by its model_type: hidden size 64, 4 query and 2 key/value heads, Qwen3's of size 32."""
    define_torchvision_operators()
    from transformers import AutoConfig

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "qwen3":
        settings["head_dim"] = 32
    return AutoConfig.for_model(family, **(settings | changes))


def tiny_model(config, seed: int = 0, dtype: torch.dtype = torch.float32):
    """The transformers model of `config`, in eval mode, with every weight random, so that each one affects results.

    transformers' own initialisation leaves norms at one and biases at zero, which hides a parameter that is mixed up
    or left out.
    """
    define_torchvision_operators()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.copy_(noise * (0.3 if weight.dim() == 1 else 1 / math.sqrt(weight.shape[-1])))
    return model.to(dtype).eval()


def save_tiny_model(folder: Path, config, seed: int = 0, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    """Save a tiny model as a Hugging Face folder without a tokenizer, in about `shards` safetensors files."""
    model = tiny_model(config, seed, dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    return folder


def tiny_run_config(folder: Path | str, changes: dict | None = None) -> Config:
    """A Config that trains the model in `folder` without a GPU, in fp32; `changes` maps dotted keys to values."""
    tree: dict = {
        "run": {"name": "test", "steps": 1, "device": "cpu"},
        "model": {"path": str(folder), "dtype": "fp32"},
        "data": {"path": "none.jsonl", "prompts_per_step": 2},
        "rollout": {"samples_per_prompt": 4, "sampling": {"max_new_tokens": 8}},
        "speculation": {"algorithm": "none"},
    }
    for key, value in (changes or {}).items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return Config.model_validate(tree)


def tiny_tokenizer(vocab_size: int = 131):
    """A byte-level tokenizer of at most `vocab_size` tokens for the tiny models."""
    define_torchvision_operators()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted({chr(code) for code in range(32, 127)} | {"Ġ", "Ċ"})
    names = ["<pad>", "<s>", "</s>", *characters][:vocab_size]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
