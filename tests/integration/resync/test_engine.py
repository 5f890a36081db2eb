"""resync/ with a live engine: after a push the engine speaks with the actor's voice, with speculation and without.

Two ranks, tensor parallel. The actor takes a real optimizer step first, so that the folder's weights, which the engine
started from, are not what it must hold afterwards.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.configs import smallest_config
from tests.support.models import save_tiny_model, tiny_config, tiny_tokenizer
from tests.support.processes.ranks import run_ranks
from tests.support.resyncs import live, step

PROMPTS = [[5, 9, 33], [7, 8, 21, 40, 3, 99], [64]]
NEW_TOKENS = 24
VOCAB = 128


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target and a random drafter of its shape: few drafts are accepted, and every one must be verified."""
    from respec_trainer.drafter.eagle3 import DrafterShape, Eagle3Drafter
    from respec_trainer.drafter.format import save_drafter

    root = tmp_path_factory.mktemp("resync")
    hf_config = tiny_config("qwen3", vocab_size=VOCAB, layers=4)
    target = save_tiny_model(root / "target", hf_config)
    tiny_tokenizer(VOCAB).save_pretrained(target)
    torch.manual_seed(0)
    drafter = Eagle3Drafter(DrafterShape.for_target(hf_config, draft_vocab_size=VOCAB))
    save_drafter(drafter, torch.arange(VOCAB), root / "drafter")
    return target, root / "drafter"


def push_and_speak(config):
    """On one rank: what the engine says before and after the push, and what the actor says."""
    with live(config) as setup:
        before = speak(setup.fleet)
        step(setup.actor)
        reports = setup.resync.push(prove=True)
        after = speak(setup.fleet)
        tokens, logprobs = setup.actor.generate_greedy(PROMPTS, NEW_TOKENS)
    return before, after, tokens, logprobs, reports


def speak(fleet):
    from respec_trainer.rollout.sample import Request, SamplingParams

    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    return fleet.start([Request(str(i), tuple(p), params) for i, p in enumerate(PROMPTS)]).collect()


def config_for(folder, folders, dtype, speculation, *overrides):
    target, drafter = folders
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


@pytest.mark.parametrize("speculation", ["none", "eagle3"])
def test_greedy_tokens_equal_the_actors(tmp_path, folders, speculation):
    config = config_for(tmp_path, folders, "fp32", speculation)
    first, second = run_ranks(2, push_and_speak, config, timeout=180)
    before, after, tokens, logprobs, reports = first
    assert [s.response_ids for s in after] == tokens
    assert [s.response_ids for s in after] == [s.response_ids for s in second[1]], "every rank gets every sample"
    assert [s.response_ids for s in before] != tokens, "the step changed nothing, so the test shows nothing"
    assert {s.actor_version for s in after} == {"actor-1"}
    # Two implementations in float32, each summing in its own order.
    assert torch.allclose(torch.tensor([s.sampler_logprobs for s in after]), torch.tensor(logprobs), atol=1e-4)
    assert [r.role for r in reports] == (["target", "draft"] if speculation == "eagle3" else ["target"])
    assert all((s.verify_count > 0) == (speculation == "eagle3") for s in after)


def test_bf16_logprobs_match_to_rounding(tmp_path, folders):
    config = config_for(tmp_path, folders, "bf16", "eagle3")
    _, after, tokens, logprobs, _ = run_ranks(2, push_and_speak, config, timeout=180)[0]
    for sample, wanted, wanted_logprobs in zip(after, tokens, logprobs, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(sample.response_ids, wanted, strict=True)) if a != b), NEW_TOKENS)
        given = torch.tensor(sample.sampler_logprobs[:same])
        # bf16 keeps 8 bits: logits of a few units carry errors of some hundredths, more where a near tie flips a token.
        assert torch.allclose(given, torch.tensor(wanted_logprobs[:same]), atol=0.1)
        assert same > 0


def push_every_way(config):
    """On one rank: reports of a push by gloo, one by handles, and one without a change; each is proved and sung for."""
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


def test_handles_carry_the_drafter_too(tmp_path, folders):
    config = config_for(tmp_path, folders, "bf16", "eagle3")
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "fp32"})})
    first, _ = run_ranks(2, push_every_way, config, timeout=180)
    assert first[:2] == [[("target", "actor-1"), ("draft", "drafter-0")], [("target", "actor-2")]]
