"""resync/ with a live engine: after a push its log-probs are the actor's, with speculation and without.

Two ranks, tensor parallel. The actor takes a real optimizer step first, so that the weights of the folder, with which
the engine started, differ from those it must hold afterwards.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.configs import smallest_config
from tests.support.models import save_tiny_model, tiny_config
from tests.support.processes.ranks import run_ranks
from tests.support.resyncs import live, step

PROMPTS = [[5, 9, 33], [7, 8, 21, 40, 3, 99], [64]]
NEW_TOKENS = 24


def push_and_speak(config):
    """Return the engine's samples before, and the engine's and the actor's after each of two steps and pushes.

    The first push uses broadcast, the second handles. Both send all weights, and are verified.
    """
    from respec_trainer.resync.ipc import IPCTransport

    with live(config) as setup:
        before, rounds = speak(setup.fleet), []
        for transport in (setup.resync.transport, IPCTransport(setup.engine, [0], 60.0)):
            setup.resync.transport = transport
            step(setup.actor)
            reports = setup.resync.push(whole=True, prove=True)
            rounds.append((reports, speak(setup.fleet), *setup.actor.generate_greedy(PROMPTS, NEW_TOKENS)))
    return before, rounds


def speak(fleet):
    from respec_trainer.rollout.sample import Request, SamplingParams

    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    return fleet.start([Request(str(i), tuple(p), params) for i, p in enumerate(PROMPTS)]).collect()


def config_for(folder, random_pair, dtype, speculation, *overrides):
    target, drafter = random_pair
    return smallest_config(
        folder,
        f"model.path={target}",
        f"model.dtype={dtype}",
        f"drafter.path={drafter}",
        f"speculation.algorithm={speculation}",
        "actor.parallel.tp=2",
        "rollout.engine.span=2",
        "actor.optim.lr=0.01",
        "resync.bucket_mb=1",
        *overrides,
    )


def test_greedy_tokens_equal_the_actors_after_a_push_by_broadcast_and_by_handles(tmp_path, random_pair):
    """The test of every family below does the same without speculation."""
    first, second = run_ranks(2, push_and_speak, config_for(tmp_path, random_pair, "fp32", "eagle3"), timeout=180)
    said = [[s.response_ids for s in first[0]]]
    for number, (mine, others) in enumerate(zip(first[1], second[1], strict=True), 1):
        reports, samples, tokens, logprobs = mine
        assert [(r.role, r.version) for r in reports] == [("target", f"actor-{number}"), ("draft", "drafter-0")]
        assert [s.response_ids for s in samples] == tokens
        assert [s.response_ids for s in others[1]] == tokens, "every rank gets every sample"
        assert tokens not in said, "the step changed nothing, so the test shows nothing"
        said.append(tokens)
        assert {s.actor_version for s in samples} == {f"actor-{number}"}
        assert all(s.verify_count > 0 for s in samples)
        # Two implementations in float32, which add in different orders.
        assert torch.allclose(torch.tensor([s.sampler_logprobs for s in samples]), torch.tensor(logprobs), atol=1e-4)


def test_bf16_logprobs_match_to_rounding(tmp_path, random_pair):
    config = config_for(tmp_path, random_pair, "bf16", "eagle3")
    _, rounds = run_ranks(2, push_and_speak, config, timeout=180)[0]
    for _, samples, tokens, logprobs in rounds:
        for sample, wanted, wanted_logprobs in zip(samples, tokens, logprobs, strict=True):
            pairs = enumerate(zip(sample.response_ids, wanted, strict=True))
            same = next((i for i, (given, want) in pairs if given != want), NEW_TOKENS)
            given = torch.tensor(sample.sampler_logprobs[:same])
            # bf16 keeps 8 bits: logits of a few units carry errors of some hundredths, more where a near tie flips a
            # token.
            assert torch.allclose(given, torch.tensor(wanted_logprobs[:same]), atol=0.1)
            assert same > 0


def push_every_way(config):
    """Return reports of a push by gloo, one by handles, and one without a change; each is verified, with the canary."""
    from respec_trainer.resync.ipc import IPCTransport

    reports = []
    with live(config) as setup:
        for transport in (setup.resync.transport, IPCTransport(setup.engine, [0], 60.0), None):
            setup.rollouts.sleep()
            if transport is not None:
                step(setup.actor)
                setup.resync.transport = transport
            pushed = []
            push = setup.resync.push
            setup.resync.push = lambda *args, **kwargs: pushed.extend(push(*args, **kwargs))  # noqa: B023
            setup.rollouts.push()
            setup.resync.push = push
            reports.append([(r.role, r.version) for r in pushed])
            assert setup.rollouts.canary_error < 1e-3 and not setup.said
            assert {s.actor_version for s in speak(setup.fleet)} == {setup.actor.version}
    return reports


@pytest.mark.parametrize(
    ("family", "tied", "vocab", "engine_tp"),
    [("qwen2", True, 131, 1), ("llama", False, 131, 1), ("qwen3", True, 99, 2)],
)
def test_every_family_arrives_bit_for_bit_by_broadcast_and_by_handles(tmp_path, family, tied, vocab, engine_tp):
    target = save_tiny_model(tmp_path / "target", tiny_config(family, tied, vocab_size=vocab))
    config = config_for(tmp_path, (target, "none"), "fp32", "none", f"rollout.engine.tp={engine_tp}")
    changed = [[("target", "actor-1")], [("target", "actor-2")], []]
    assert run_ranks(2, push_every_way, config, timeout=180) == [changed, changed]
