"""resync/stream.py: what streams out of TP x ZeRO shards is bit for bit what went in, on the ranks that want it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.configs import smallest_config
from tests.integration.ranks import run_ranks
from tests.models import save_tiny_model, tiny_config

# Smaller than any model here, so that every stream has several buckets and some parameters exceed one.
BUCKET = 8 << 10


def stream_cases(cases):
    """On one rank: {(case, receivers): {name: tensor}} of what each stream of each case delivered here."""
    from respec_trainer.actor.engine import Actor
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.resync.stream import stream_actor

    out = {}
    topology = init_parallel(cases[0][1])  # the same tp in every case
    for label, config in cases:
        actor = Actor(config, topology, total_updates=1)
        for receivers in ((0,), (1,), (0, 1)):
            buckets = [list(b) for b in stream_actor(actor, receivers, BUCKET)]
            pairs = [(name, tensor.clone()) for bucket in buckets for name, tensor in bucket]
            assert len({name for name, _ in pairs}) == len(pairs), "a tensor came twice"
            assert topology.rank not in receivers or len(buckets) > 1, "the model must not fit one bucket"
            out[label, receivers] = dict(pairs)
    shutdown_parallel()
    return out


@pytest.mark.parametrize("tp", [1, 2])
def test_stream_is_bit_equal(tmp_path, tp):
    models, cases = {}, []
    for family, tied in (("qwen2", True), ("qwen3", False), ("llama", False)):
        folder = save_tiny_model(tmp_path / f"{family}", tiny_config(family, tied), dtype=torch.bfloat16)
        for stage in (1, 2, 3):
            label = f"{family}-zero{stage}"
            models[label] = folder
            shape = [f"actor.parallel.tp={tp}", f"actor.zero.stage={stage}"]
            cases.append((label, smallest_config(tmp_path, f"model.path={folder}", *shape)))
    by_rank = run_ranks(2, stream_cases, cases, timeout=120)
    for label, folder in models.items():
        expected = load_file(folder / "model.safetensors")
        for receivers in ((0,), (1,), (0, 1)):
            for rank, delivered in enumerate(by_rank):
                got = delivered[label, receivers]
                if rank not in receivers:
                    assert not got, f"{label}: rank {rank} got tensors it did not ask for"
                    continue
                assert set(got) == set(expected), label
                wrong = [name for name in got if not torch.equal(got[name], expected[name])]
                assert not wrong, f"{label} at TP {tp}: {wrong}"
