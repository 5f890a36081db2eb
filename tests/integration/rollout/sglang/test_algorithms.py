"""SGLangEngine with a smaller model as the drafter, and with n-grams: the same tokens and the same distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from respec_trainer.config import EngineConfig, SpeculationConfig
from respec_trainer.errors import EngineError
from respec_trainer.rollout.sample import ACCEPTED, Request, SamplingParams
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from tests.support.rollout_models import TRUNCATED, Reference, check_truncated, save_target

PROMPTS = ((5, 6, 7), (9, 4, 9, 4, 9, 4, 9), (3, 100, 130, 17, 22, 64, 64, 65))
SHAPES = {
    "standalone": SpeculationConfig(algorithm="standalone", steps=3, topk=1, draft_tokens=4),
    "standalone tree": SpeculationConfig(algorithm="standalone", steps=2, topk=2, draft_tokens=5),
    "ngram": SpeculationConfig(algorithm="ngram", topk=2, draft_tokens=6),
}


@pytest.fixture(scope="module", params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def target(shape, tmp_path_factory):
    return save_target(tmp_path_factory.mktemp(shape.algorithm) / "target", "qwen2" if shape.topk == 1 else "qwen3")


@pytest.fixture(scope="module")
def reference(target):
    return Reference(target)


@pytest.fixture(scope="module")
def engine(shape, target, reference):
    config, folder = EngineConfig(max_total_tokens=8192), None
    if shape.algorithm == "standalone":
        folder = str(save_perturbed(reference, target.parent / "drafter"))
    seeded = shape.topk > 1  # so both seeded and unseeded draws are tested
    engine = SGLangEngine(EngineSettings(str(target), folder, "fp32", speculation=shape, engine=config, seeded=seeded))
    engine.start()
    yield engine
    engine.shutdown()


def save_perturbed(reference: Reference, folder):
    """Save the target with noise on its weights, as a drafter that is often right but not always."""
    generator = torch.Generator().manual_seed(0)
    before = {name: weight.clone() for name, weight in reference.model.state_dict().items()}
    noisy = {n: w + 0.1 * w.std() * torch.randn(w.shape, generator=generator) for n, w in before.items()}
    reference.model.load_state_dict(noisy)
    reference.model.save_pretrained(folder)
    reference.model.load_state_dict(before)
    return folder


def accepted(samples) -> int:
    return sum(sample.origins.count(ACCEPTED) for sample in samples)


def test_greedy_tokens_equal_transformers(engine, reference):
    greedy = SamplingParams(60, temperature=0.0, ignore_eos=True)
    samples = engine.submit([Request("k", prompt, greedy) for prompt in PROMPTS]).collect()
    assert [s.response_ids for s in samples] == [reference.greedy(prompt, 60) for prompt in PROMPTS]
    assert accepted(samples) > 20


def test_verification_samples_from_the_target(engine, reference):
    """The most probable tokens repeat, so n-grams of earlier tokens are often accepted."""
    request = Request("k", PROMPTS[1], SamplingParams(5, temperature=0.8, ignore_eos=True))
    samples = engine.submit([request] * 1500).collect()
    assert accepted(samples) > 250, "without accepted drafts there is nothing to test"
    assert reference.p_value(PROMPTS[1], [s.response_ids for s in samples], 3, 0.8) > 1e-3


def test_log_probs_are_of_what_top_k_and_top_p_keep(engine, reference):
    asked = list(TRUNCATED * 4)
    samples = engine.submit([Request("k", PROMPTS[1], params) for params in asked]).collect()
    check_truncated(reference, samples, asked)


def test_the_padding_token_of_ngram_trees_keeps_its_probability(engine, shape, reference, target):
    """sglang pads with copies of token 0, each of which could be accepted, so token 0 would be drawn too often."""
    if shape.algorithm != "ngram":
        pytest.skip("only n-gram trees are padded")
    second = Counter()
    for sequence, mass in reference.law(PROMPTS[0], 2, 1.0, least=1e-3).items():
        second[sequence[1]] += mass
    ((likely, mass),) = second.most_common(1)
    assert mass > 0.05
    other = Reference(target)
    head = other.model.get_output_embeddings().weight.data
    head[[0, likely]] = head[[likely, 0]]
    push(engine, other.model.state_dict())
    try:
        request = Request("k", PROMPTS[0], SamplingParams(3, ignore_eos=True))
        drawn = [sample.response_ids for sample in engine.submit([request] * 1500).collect()]
    finally:
        push(engine, reference.model.state_dict())
    assert other.p_value(PROMPTS[0], drawn, 2, 1.0) > 1e-3


def test_seeds_fix_the_draws_since_the_last_update(engine, reference):
    """N-grams depend on the tokens generated so far; a weight update removes these."""
    if not engine.settings.seeded:
        return

    def draw(first_seed: int) -> list[list[int]]:
        push(engine, reference.model.state_dict())
        settings = [SamplingParams(24, ignore_eos=True, seed=first_seed + i) for i in range(24)]
        samples = engine.submit([Request("k", PROMPTS[i % 3], s) for i, s in enumerate(settings)]).collect()
        assert accepted(samples) > 20
        return [sample.response_ids for sample in samples]

    first = draw(7)
    assert draw(7) == first and all(mine != other for mine, other in zip(first, draw(1000), strict=True))


def push(engine, weights) -> None:
    engine.begin_weight_update("target")
    engine.receive_tensors(list(weights.items()), "target").result(60)
    engine.end_weight_update("target", "actor-1")


def test_the_drafter_is_not_updated(engine):
    with pytest.raises(EngineError, match="no draft model"):
        engine.begin_weight_update("draft")
