"""Targets with Qwen3's grouped attention and heads of 128, and drafters for them that are right without training.

GPU kernels are made for head sizes of 64 and 128, which the tiny models of the other tests do not have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from respec_trainer.dtypes import DTYPES
from tests.support.models import tiny_config, tiny_model, tiny_tokenizer

HEAD = 128
MATCH = 2.5  # scale of the drafter's queries and keys: how strongly a token attends to itself


@dataclass(frozen=True)
class Size:
    """Sizes of a target.

    Its key/value heads together are as wide as the hidden size, so that the drafter's attention can pass on a whole
    embedding.
    """

    vocab: int
    kv_heads: int
    layers: int
    sharpness: float  # standard deviation of the logits
    positions: int

    @property
    def hidden(self) -> int:
        return self.kv_heads * HEAD


SMALL = Size(vocab=512, kv_heads=2, layers=4, sharpness=3.5, positions=512)
LARGE = Size(vocab=32768, kv_heads=8, layers=8, sharpness=5.0, positions=2048)


@dataclass(frozen=True)
class Pair:
    """The folders of a target, with a tokenizer, and of its drafter."""

    target: Path
    drafter: Path
    size: Size


def save_pair(root: Path, size: Size, dtype: str) -> Pair:
    """Write target and drafter in `dtype`, "fp32" or "bf16"."""
    kind = DTYPES[dtype]
    model = _target(size)
    _save_drafter(root / "drafter", model, kind)
    model.to(kind).save_pretrained(root / "target")
    tiny_tokenizer().save_pretrained(root / "target")
    return Pair(root / "target", root / "drafter", size)


def _target(size: Size):
    """A random Qwen3 whose next token depends mostly on the last one: embeddings outweigh what the layers add."""
    config = tiny_config(
        "qwen3",
        vocab_size=size.vocab,
        layers=size.layers,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_attention_heads=2 * size.kv_heads,
        num_key_value_heads=size.kv_heads,
        head_dim=HEAD,
        max_position_embeddings=size.positions,
    )
    model = tiny_model(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(math.sqrt(size.hidden))
        model.get_output_embeddings().weight.mul_(size.sharpness)
        for name, weight in model.named_parameters():
            if "o_proj.weight" in name or "down_proj.weight" in name:
                weight.mul_(0.1)
    return model


def _save_drafter(folder: Path, model, dtype: torch.dtype) -> None:
    """Save a drafter that computes the target's last step: logits = head(norm(embedding of the last token)).

    Each token attends to itself, because equal embeddings match. The attention's output is the embedding minus the
    feature, and the residual stream adds the feature again. Only the first of the two query heads that share a key
    head is used.
    """
    from respec_trainer.drafter.eagle3 import Eagle3Drafter
    from respec_trainer.drafter.format import save_drafter
    from respec_trainer.drafter.shape import DrafterShape

    config = model.config
    drafter = Eagle3Drafter(DrafterShape.for_target(config, config.vocab_size, intermediate_size=64))
    width = config.hidden_size
    eye, nothing = torch.eye(width), torch.zeros(width, width)
    by_head = eye.view(config.num_key_value_heads, 1, HEAD, width).expand(-1, 2, -1, -1).reshape(2 * width, width)
    read = torch.zeros(2 * width, width).view(config.num_key_value_heads, 2, HEAD, width)
    read[:, 0] = eye.view(config.num_key_value_heads, HEAD, width)
    state = {name: torch.zeros_like(weight) for name, weight in drafter.state_dict().items()}
    state |= {name: torch.ones_like(weight) for name, weight in state.items() if "norm" in name}
    state |= {
        "midlayer.self_attn.q_proj.weight": MATCH * torch.cat((by_head, torch.zeros_like(by_head)), 1),
        "midlayer.self_attn.k_proj.weight": MATCH * torch.cat((eye, nothing), 1),
        "midlayer.self_attn.v_proj.weight": torch.cat((eye, -eye), 1),
        "midlayer.self_attn.o_proj.weight": read.reshape(2 * width, width).t().contiguous(),
        "norm.weight": model.model.norm.weight.detach().clone(),
        "lm_head.weight": model.get_output_embeddings().weight.detach().clone(),
    }
    drafter.load_state_dict(state)
    save_drafter(drafter, torch.arange(config.vocab_size), folder, dtype)


def prompts(count: int, vocab: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Return `count` prompts of 3 to 40 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 41, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, vocab, (n,), generator=generator).tolist()) for n in lengths]


def shortfall(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return how far the logits [n, V] of `tokens` [n] are below the largest, at worst: 0 for greedy choices.

    Two correct implementations choose different tokens where two logits nearly tie, and then all later tokens differ.
    So a response is checked token by token: each must be the best after the tokens before it, or as good to rounding.
    """
    best, chosen = logits.max(-1).values, logits.gather(-1, tokens[:, None])[:, 0]
    return float((best - chosen).max())
