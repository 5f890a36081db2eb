"""resync/ with a live engine: after a push the engine speaks with the actor's voice, with speculation and without.

Two ranks, tensor parallel. The actor takes a real optimizer step first, so that the folder's weights, which the engine
started from, are not what it must hold afterwards.
"""

from __future__ import annotations

import pytest
import torch

from tests.configs import smallest_config
from tests.integration.ranks import run_ranks
from tests.models import save_tiny_model, tiny_config, tiny_tokenizer

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
    import torch.distributed as dist

    from respec_trainer.actor.engine import Actor
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.drafter.learner import setup_learner
    from respec_trainer.resync import Resync
    from respec_trainer.resync.transport import setup_transport
    from respec_trainer.rollout.fleet import RolloutFleet
    from respec_trainer.rollout.sglang_engine import EngineSettings, SGLangEngine

    topology = init_parallel(config)
    control = dist.new_group(backend="gloo")
    actor = Actor(config, topology, total_updates=1)
    learner = setup_learner(config, actor.hf_config)
    fleet = RolloutFleet(config, lambda i: SGLangEngine(EngineSettings.from_config(config, "cpu", i)), control, "cpu")
    try:
        transport = setup_transport(config, "cpu", fleet.engine, fleet.owners, control)
        drafter = learner if config.speculation.algorithm != "none" else None
        resync = Resync(config, actor, drafter, fleet.engine, transport, control)
        before = speak(fleet)
        step(actor)
        reports = resync.push(1, prove=True)
        after = speak(fleet)
        tokens, logprobs = actor.generate_greedy(PROMPTS, NEW_TOKENS)
    finally:
        fleet.shutdown()
    shutdown_parallel()
    return before, after, tokens, logprobs, reports


def speak(fleet):
    from respec_trainer.rollout.sample import Request, SamplingParams

    greedy = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    return fleet.start([Request(str(i), tuple(p), greedy) for i, p in enumerate(PROMPTS)]).collect()


def step(actor):
    """One optimizer step on made-up samples."""
    from respec_trainer.rollout.batch import collate
    from respec_trainer.rollout.sample import Sample

    samples = [
        Sample("k", p, [11 + i, 50, 60 + i], [-3.0] * 3, "stop", "a", "d") for i, p in enumerate(PROMPTS + [[1]])
    ]
    batch = collate(samples, pad_id=0)
    actor.update(batch, actor.infer(batch).logprobs, torch.tensor([1.0, -1.0, 2.0, -0.5]))


def config_for(folder, folders, dtype, speculation):
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
