"""Converted weights in the actor's own model: its parameters are those of the map, its logits transformers'."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from respec_trainer.checkpoint.progress import Silent
from respec_trainer.convert.convert import to_megatron
from respec_trainer.models.registry import FAMILIES
from tests.support.actors import build_actor, variant
from tests.support.models import save_tiny_model, tiny_config, tiny_model, tiny_run_config
from tests.support.processes.ranks import run_ranks
from tests.support.saved_models import read_all, same

TOLERANCE = 1e-5  # in float32, relative to the largest logit


def logit_errors(folders: list[tuple]) -> dict[tuple, float]:
    """Return, for each (Hugging Face folder, converted folder), the difference of the logits from transformers'."""
    from respec_trainer.actor.loading import load_hf_config, load_weights
    from respec_trainer.actor.model import build_model
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.weights.hf_map import megatron_shapes

    tp = int(os.environ["WORLD_SIZE"])
    topology = init_parallel(tiny_run_config("-", {"actor.parallel.tp": tp}))
    errors = {}
    for hf, converted in folders:
        hf_config = load_hf_config(converted / "hf")
        config = tiny_run_config(hf, {"actor.parallel.tp": tp})
        model = build_model(hf_config, config.actor, torch.float32, topology.device, config.rollout.sampling)
        held = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert held == megatron_shapes(hf_config, tp)
        load_weights(model, hf_config, converted, topology)
        tokens = torch.randint(0, hf_config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
        shard = model(tokens, torch.ones_like(tokens, dtype=torch.bool), want="logits").detach().contiguous()
        shards = [torch.empty_like(shard) for _ in range(tp)]
        dist.all_gather(shards, shard, group=topology.tp_group)
        logits = torch.cat(shards, 1)[:, : hf_config.vocab_size].view(2, 8, -1)
        expected = tiny_model(hf_config)(tokens).logits.detach()
        error = (logits - expected).abs().max() / expected.abs().max()
        errors[hf_config.model_type, hf_config.tie_word_embeddings] = error.item()
    shutdown_parallel()
    return errors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Make folders and configs by (family, tied): two key/value heads, a vocabulary of 131, which no tp > 1 divides."""
    made = {}
    for family, tied in itertools.product(FAMILIES, (False, True)):
        config = tiny_config(family, tied)
        made[family, tied] = save_tiny_model(tmp_path_factory.mktemp(f"{family}-{tied}"), config, shards=2), config
    return made


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logits_after_conversion_are_transformers(models, tp):
    folders = []
    for folder, config in models.values():
        converted = folder.with_name(f"{folder.name}-tp{tp}")
        to_megatron(folder, config, converted, tp, None, Silent())
        folders.append((folder, converted))
    for errors in run_ranks(tp, logit_errors, folders):
        assert errors.keys() == models.keys()
        assert max(errors.values()) <= TOLERANCE, errors


def exported(folder: Path, out: Path) -> None:
    """Export an untrained actor, in several files."""
    from respec_trainer.actor.parallel import shutdown_parallel
    from respec_trainer.export import export_actor

    actor = build_actor(folder, variant(2, 1, 1))
    export_actor(actor, folder, out, shard_bytes=60_000)
    shutdown_parallel()


def test_an_exported_actor_that_was_not_trained_is_its_source(models, tmp_path):
    folder, _ = models["qwen2", True]
    run_ranks(2, exported, folder, tmp_path / "actor")
    assert same(read_all(folder), read_all(tmp_path / "actor"))
    assert (tmp_path / "actor/model.safetensors.index.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["actor"]
