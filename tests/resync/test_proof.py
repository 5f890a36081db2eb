"""resync/proof.py and rollout/sglang/inside/digest.py: fused weights taken apart, names compared."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from respec_trainer.errors import ProofError, ResyncError
from respec_trainer.resync.proof import Held, as_sent, check, check_architecture
from respec_trainer.rollout.digest import digest
from respec_trainer.rollout.sglang.inside.digest import named_parts


class Fused(nn.Module):
    """A model with the names and the layout of sglang's modules that these tests need."""

    def __init__(self, weights):
        super().__init__()
        self.qkv_proj = nn.Linear(4, 8, bias=True)
        self.qkv_proj.q_proj_shard_size, self.qkv_proj.kv_proj_shard_size = 4, 2
        self.qkv_proj.v_proj_shard_size = 2
        self.gate_up_proj = nn.Linear(4, 6, bias=False)
        self.embed_tokens = nn.Embedding(64, 4)
        self.embed_tokens.org_vocab_size = 50
        self.head = self.embed_tokens
        with torch.no_grad():
            self.qkv_proj.weight.copy_(torch.cat([weights[f"{x}_proj.weight"] for x in "qkv"]))
            self.qkv_proj.bias.copy_(torch.cat([weights[f"{x}_proj.bias"] for x in "qkv"]))
            self.gate_up_proj.weight.copy_(torch.cat([weights["gate_proj.weight"], weights["up_proj.weight"]]))
            self.embed_tokens.weight[:50] = weights["embed_tokens.weight"]


def sent_weights():
    shapes = {"q_proj.weight": (4, 4), "k_proj.weight": (2, 4), "v_proj.weight": (2, 4), "q_proj.bias": (4,)}
    shapes |= {"k_proj.bias": (2,), "v_proj.bias": (2,), "gate_proj.weight": (3, 4), "up_proj.weight": (3, 4)}
    return {f"layer.{name}": torch.randn(shape) for name, shape in (shapes | {"embed_tokens.weight": (50, 4)}).items()}


def test_parts_have_the_digests_of_what_was_sent():
    sent = sent_weights()
    model = nn.ModuleDict({"layer": Fused({name.removeprefix("layer."): t for name, t in sent.items()})})
    model.config = SimpleNamespace(model_type="qwen2")
    held = {name: digest(tensor) for name, tensor in named_parts(model)}
    assert held == {name: digest(tensor) for name, tensor in sent.items()}
    check("target", Held("actor-0", held), held)


@pytest.mark.parametrize(
    ("sent", "held", "message"),
    [
        ({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, "target weights are not actor-3: b differs"),
        ({"a": "1"}, {}, "a is not in the engine"),
        ({}, {"lm_head.weight": "1"}, "lm_head.weight was not sent"),
    ],
)
def test_differences_are_named(sent, held, message):
    with pytest.raises(ProofError, match=f"{message}$"):  # no excuse: it was part of the push
        check("target", Held("actor-3", sent), held)


def test_many_differences_are_counted():
    with pytest.raises(ProofError, match="a differs, b differs, c differs, d differs, e differs and 2 more"):
        check("target", Held("actor-3", dict.fromkeys("abcdefg", "1")), dict.fromkeys("abcdefg", "2"))


def test_as_many_as_are_listed_are_not_counted():
    with pytest.raises(ProofError, match="a differs, b differs, c differs, d differs, e differs$"):
        check("target", Held("actor-3", dict.fromkeys("abcde", "1")), dict.fromkeys("abcde", "2"))


@pytest.mark.parametrize(
    ("held", "sent"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "midlayer.self_attn.q_proj.weight"),
        ("model.norm.weight", "norm.weight"),
        ("layers.0.block.layers.0.weight", "midlayer.block.layers.0.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_drafter_s_weights_are_sent_without_the_engine_s_outer_modules(held, sent):
    assert as_sent(held, "draft") == sent and as_sent(held, "target") == held


def test_a_drafter_goes_by_its_stored_names_and_shares_the_embedding():
    held = {"model.layers.0.mlp.up_proj.weight": "1", "model.fc.weight": "2", "model.embed_tokens.weight": "3"}
    check("draft", Held("drafter-1", {"midlayer.mlp.up_proj.weight": "1", "fc.weight": "2"}), held)
    with pytest.raises(ProofError, match="draft weights are not drafter-1: fc.weight differs.*something else changed"):
        check("draft", Held("drafter-1", {"midlayer.mlp.up_proj.weight": "1", "fc.weight": "9"}), held, pushed=False)


def test_another_architecture_is_named_by_its_first_tensor():
    ours = {"model.norm.weight": (4,), "lm_head.weight": (9, 4)}
    check_architecture("target", ours, dict(ours), "")
    for theirs, words in (
        ({**ours, "lm_head.weight": (8, 4)}, r"of shape \[8, 4\] in the engine and of shape \[9, 4\] in the trainer"),
        ({"model.norm.weight": (4,)}, "lm_head.weight is absent in the engine"),
        ({**ours, "b.bias": (4,)}, r"b.bias is of shape \[4\] in the engine and absent .*initial.*actor-0"),
    ):
        with pytest.raises(ResyncError, match=words):
            check_architecture("target", ours, theirs, "the engine's initial, the trainer's actor-0")
