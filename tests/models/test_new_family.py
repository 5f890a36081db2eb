"""A family is one file and its line in the registry: every part of the package then supports it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from respec_trainer.actor.check import check_model
from respec_trainer.drafter.shape import DrafterShape
from respec_trainer.drafter.teacher import HFTeacher
from respec_trainer.errors import ConfigError
from respec_trainer.rollout.sglang.inside.digest import named_parts
from respec_trainer.weights.hf_map import hf_model_shapes, megatron_shapes, megatron_shard, to_hf
from tests.support.drafters import random_rollouts
from tests.support.models import save_tiny_model, tiny_config, tiny_model
from tests.support.olive import olive_known


@pytest.fixture(autouse=True)
def olive():
    with olive_known():
        yield


def test_its_config_is_checked_by_limits_of_its_own():
    check_model(tiny_config("olive"), 2)
    with pytest.raises(ConfigError, match="model.path: config.json of this olive model has num_hidden_layers=9"):
        check_model(tiny_config("olive", layers=9), 1)
    with pytest.raises(ConfigError, match="architectures LlamaForCausalLM, but only OliveForCausalLM is supported"):
        check_model(tiny_config("olive", architectures=["LlamaForCausalLM"]), 1)


def test_its_weights_become_megatrons_and_come_back():
    config = tiny_config("olive")
    weights = tiny_model(config).state_dict()
    assert hf_model_shapes(config) == {name: tuple(weight.shape) for name, weight in weights.items()}
    assert "classifier.weight" in weights and "model.layers.0.self_attn.q_proj.bias" in weights
    returned = {}
    for name, shape in megatron_shapes(config, 2).items():
        shards = [megatron_shard(name, lambda n, i: weights[n][i], config, rank, 2) for rank in range(2)]
        assert all(shard.shape == shape for shard in shards)
        returned |= dict(to_hf(name, shards, config))
    assert all(torch.equal(returned[name], weight) for name, weight in weights.items())


def test_its_fused_weights_in_the_engine_are_taken_apart():
    class Engine(torch.nn.Module):
        config = SimpleNamespace(model_type="olive")

        def __init__(self):
            super().__init__()
            self.qkv_proj, self.gate_up_proj = torch.nn.Linear(4, 8), torch.nn.Linear(4, 6, bias=False)
            self.qkv_proj.q_proj_shard_size, self.qkv_proj.kv_proj_shard_size = 4, 2
            self.qkv_proj.v_proj_shard_size = 2

    layer = Engine()
    parts = {name.removeprefix("."): part for name, part in named_parts(layer)}
    assert torch.equal(parts["k_proj.bias"], layer.qkv_proj.bias[4:6])
    assert torch.equal(parts["up_proj.weight"], layer.gate_up_proj.weight[3:])


def test_its_drafter_has_the_shape_it_chooses():
    config = tiny_config("olive", layers=6)
    shape = DrafterShape.for_target(config, 64)
    assert (shape.intermediate_size, shape.feature_layers) == (128, (0, 2, 4))


def test_it_teaches_a_drafter(tmp_path):
    config = tiny_config("olive", layers=4)
    teacher = HFTeacher(save_tiny_model(tmp_path, config), torch.arange(64), (0, 1, 2))
    batch = random_rollouts([(3, 4)])
    logits = tiny_model(config)(batch.tokens).logits[0, 2:-1, :64]
    torch.testing.assert_close(teacher(batch).draft_logits, logits, rtol=1e-4, atol=1e-4)
