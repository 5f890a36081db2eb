"""SGLangEngine with EAGLE-3, chain and tree, in fp32: the same tokens and distribution, in fewer passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from respec_trainer.config import EngineConfig, SpeculationConfig
from respec_trainer.errors import EngineError
from respec_trainer.export import export_drafter
from respec_trainer.rollout.sample import ACCEPTED, BONUS, UNDRAFTED, Request, SamplingParams
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from tests.support.rollout_models import (
    TRUNCATED,
    VOCAB,
    Reference,
    check_truncated,
    drafter_weights,
    save_drafter,
    save_target,
)

PROMPTS = ((5, 6, 7), (9,), (3, 100, 130, 17, 22, 64, 64, 65))
# Not every token can be drafted, so the drafter's token numbers differ from the target's.
DRAFT_IDS = torch.tensor([token for token in range(VOCAB) if token % 7 != 3])
# (family, shape, whether the drafter is one that this package's own layers compute, its vocabulary)
KINDS = {
    "chain": ("qwen2", SpeculationConfig(steps=3, topk=1, draft_tokens=4), True, DRAFT_IDS),
    "tree": ("llama", SpeculationConfig(steps=3, topk=2, draft_tokens=6), False, DRAFT_IDS),
    "rejection": ("qwen3", SpeculationConfig(rejection_sampling=True), True, torch.arange(VOCAB)),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def target(kind, tmp_path_factory):
    return save_target(tmp_path_factory.mktemp(kind) / "target", KINDS[kind][0])


@pytest.fixture(scope="module")
def reference(target):
    return Reference(target)


@pytest.fixture(scope="module")
def engine(kind, target):
    _, shape, plain, ids = KINDS[kind]
    drafter = target.parent / "drafter"  # as a run exports it
    export_drafter(lambda folder: save_drafter(folder, target, ids, plain), drafter, torch.float32)
    config = EngineConfig(max_total_tokens=8192)
    engine = SGLangEngine(
        EngineSettings(
            str(target), str(drafter), "fp32", speculation=shape, engine=config, seeded=not shape.rejection_sampling
        )
    )
    engine.start()
    yield engine
    engine.shutdown()


def ask(engine, *params: SamplingParams, prompt=PROMPTS[0]):
    return engine.submit([Request(str(i), prompt, p) for i, p in enumerate(params)]).collect()


def check_origins(sample, accepted: int) -> None:
    """Check origins: the prompt's token, then passes of accepted drafts and a bonus token; the last may be cut off."""
    origins = sample.origins
    assert len(origins) == len(sample.response_ids)
    assert origins[0] == UNDRAFTED and set(origins[1:]) <= {ACCEPTED, BONUS}
    passes = "".join(map(str, origins[1:])).split(str(BONUS))
    depths = [len(run) for run in passes[:-1]] + [len(passes[-1])] * bool(passes[-1])
    assert len(depths) == sample.verify_count
    whole = Counter(depths[: len(depths) - bool(passes[-1])])
    histogram = Counter(dict(enumerate(sample.accept_histogram)))
    cut = accepted - origins.count(ACCEPTED)
    assert (histogram - whole).total() == bool(passes[-1]) and 0 <= cut <= (3 if passes[-1] else 0)


GREEDY = SamplingParams(24, temperature=0.0, ignore_eos=True)


def test_greedy_tokens_equal_transformers_in_fewer_passes(engine, reference):
    samples = engine.submit([Request("k", prompt, GREEDY) for prompt in PROMPTS]).collect()
    assert [s.response_ids for s in samples] == [reference.greedy(prompt, 24) for prompt in PROMPTS]
    for sample in samples:
        assert sum(sample.accept_histogram) == sample.verify_count
        # One token comes from the prompt pass; the last pass may have accepted more tokens than were still needed.
        accepted = sum(depth * count for depth, count in enumerate(sample.accept_histogram))
        assert 23 <= sample.verify_count + accepted <= 23 + 3
        assert sample.accept_length == pytest.approx(23 / sample.verify_count)
        check_origins(sample, accepted)
    assert sum(s.accept_length for s in samples) / 3 > 2


def test_verification_samples_from_the_target(engine, reference):
    samples = ask(engine, *[SamplingParams(5, temperature=0.8, ignore_eos=True)] * 1500)
    for sample in samples:
        check_origins(sample, sum(depth * count for depth, count in enumerate(sample.accept_histogram)))
    accepted = sum(s.accept_histogram[1] for s in samples if len(s.accept_histogram) > 1)
    assert accepted > 250, "without accepted drafts there is nothing to test"
    assert reference.p_value(PROMPTS[0], [s.response_ids for s in samples], 3, 0.8) > 1e-3


def test_seeds_fix_the_draws(engine, kind):
    if kind == "rejection":
        return  # the drafter draws too, without a seed, so the configuration refuses seeds

    def draw(first_seed: int) -> list[list[int]]:
        settings = [SamplingParams(16, ignore_eos=True, seed=first_seed + i) for i in range(24)]
        samples = engine.submit([Request("k", PROMPTS[i % 3], s) for i, s in enumerate(settings)]).collect()
        assert sum(sample.origins.count(ACCEPTED) for sample in samples) > 50
        return [sample.response_ids for sample in samples]

    assert draw(2**62) == draw(2**62)
    assert all(mine != other for mine, other in zip(draw(2**62), draw(1000), strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_at_the_temperature(engine, reference, temperature):
    for sample in ask(engine, *[SamplingParams(16, temperature=temperature, ignore_eos=True)] * 4):
        expected = reference.logprobs(PROMPTS[0], sample.response_ids, temperature)
        torch.testing.assert_close(torch.tensor(sample.sampler_logprobs), expected, atol=2e-5, rtol=0)  # fp32 sums


def test_log_probs_are_of_what_top_k_and_top_p_keep(engine, reference):
    asked = [*TRUNCATED, TRUNCATED[2]] * 4
    check_truncated(reference, ask(engine, *asked), asked)


def test_requests_of_one_batch_keep_their_own_parameters(engine, reference):
    expected = reference.greedy(PROMPTS[0], 24)
    stop = expected[6]
    samples = ask(
        engine,
        GREEDY,
        SamplingParams(24, temperature=2.0, ignore_eos=True),
        SamplingParams(24, temperature=2.0, top_k=1, ignore_eos=True),
        SamplingParams(24, temperature=2.0, top_p=1e-6, ignore_eos=True),
        SamplingParams(24, temperature=0.0, stop_token_ids=(stop,)),
        SamplingParams(7, temperature=0.0, ignore_eos=True),
    )
    assert samples[0].response_ids == samples[2].response_ids == samples[3].response_ids == expected
    assert samples[1].response_ids != expected
    assert samples[4].response_ids == expected[: expected.index(stop) + 1] and samples[4].finish_reason == "stop"
    assert samples[5].response_ids == expected[:7]
    assert all(len(s.sampler_logprobs) == len(s.response_ids) for s in samples)


def push(engine, role, weights, version):
    engine.begin_weight_update(role)
    engine.receive_tensors(list(weights.items()), role).result(60)
    engine.end_weight_update(role, version)


def test_a_new_drafter_changes_the_speed_and_nothing_else(engine, reference, target, kind):
    """The target's weights never reach the drafter either."""
    push(engine, "target", reference.model.state_dict(), "initial")  # empties the prefix cache, like every update
    before = ask(engine, GREEDY)[0]
    drafter = drafter_weights(target, KINDS[kind][3])
    if KINDS[kind][2]:
        drafter.pop("input_norm.weight")
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(weight.shape, generator=generator) for name, weight in drafter.items()}
    push(engine, "draft", noise, "drafter-1")
    lost = ask(engine, GREEDY)[0]
    assert lost.response_ids == before.response_ids and lost.accept_length < before.accept_length - 0.5
    assert (lost.drafter_version, lost.actor_version) == ("drafter-1", "initial")
    push(engine, "draft", drafter, "drafter-2")
    push(engine, "target", reference.model.state_dict(), "actor-1")
    found = ask(engine, GREEDY)[0]
    assert found.response_ids == before.response_ids and found.accept_length > lost.accept_length + 0.5
    # Under rejection sampling a request's first draft is drawn, even where the request is greedy.
    assert kind == "rejection" or found.accept_histogram == before.accept_histogram
    assert (found.drafter_version, found.actor_version) == ("drafter-2", "actor-1")


def test_shared_and_fixed_drafter_tensors_are_refused(engine):
    engine.begin_weight_update("draft")
    try:
        for name, tensor in (("d2t", DRAFT_IDS), ("embed_tokens.weight", torch.ones(VOCAB, 64))):
            with pytest.raises(EngineError, match=f"{name} cannot be updated"):
                engine.receive_tensors([(name, tensor)], "draft").result(60)
        with pytest.raises(EngineError, match="no layers.0.mlp"):
            engine.receive_tensors([("layers.0.mlp.up_proj.weight", torch.ones(32, 64))], "draft").result(60)
    finally:
        engine.end_weight_update("draft", "drafter-3")
