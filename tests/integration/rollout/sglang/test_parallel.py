"""SGLangEngine with two tensor-parallel ranks on a CPU, plain and EAGLE-3: tokens, and digests of joined weights."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from respec_trainer.config import EngineConfig, SpeculationConfig
from respec_trainer.rollout.digest import digest
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from tests.support.models import save_tiny_model, tiny_config
from tests.support.rollout_models import VOCAB, Reference, save_drafter, save_target

PROMPTS = ((5, 6, 7), (9,), (3, 100, 130, 17, 22, 64, 64, 65))
DRAFT_IDS = torch.tensor([token for token in range(VOCAB) if token % 7 != 3])
CHAIN = SpeculationConfig(steps=3, topk=1, draft_tokens=4)
GREEDY = SamplingParams(24, temperature=0.0, ignore_eos=True)


def started(target, drafter=None) -> SGLangEngine:
    config = EngineConfig(tp=2, max_total_tokens=8192)
    shape = {"drafter_path": str(drafter), "speculation": CHAIN} if drafter else {}
    engine = SGLangEngine(EngineSettings(str(target), dtype="fp32", engine=config, **shape))
    engine.start()
    return engine


def test_plain_with_heads_that_ranks_cannot_share(tmp_path):
    """Tokens equal those of transformers, and digests those of the folder's weights."""
    target = save_tiny_model(tmp_path / "target", tiny_config("qwen2", num_key_value_heads=1))
    reference, engine = Reference(target), started(target)
    try:
        samples = engine.submit([Request("k", prompt, GREEDY) for prompt in PROMPTS]).collect()
        assert [s.response_ids for s in samples] == [reference.greedy(prompt, 24) for prompt in PROMPTS]
        weights = dict(reference.model.state_dict())
        assert engine.digests("target") == {name: digest(weight) for name, weight in weights.items()}
    finally:
        engine.shutdown()


def test_eagle3_chain(tmp_path):
    target = save_target(tmp_path / "target", "qwen3")
    drafter = save_drafter(tmp_path / "drafter", target, DRAFT_IDS)
    reference, engine = Reference(target), started(target, drafter)
    try:
        samples = engine.submit([Request("k", prompt, GREEDY) for prompt in PROMPTS]).collect()
        assert [s.response_ids for s in samples] == [reference.greedy(prompt, 24) for prompt in PROMPTS]
        assert sum(s.accept_length for s in samples) / len(samples) > 2
        held = {name.removeprefix("model."): value for name, value in engine.digests("draft").items()}
        for name, weight in load_file(drafter / "model.safetensors").items():
            if name not in ("d2t", "t2d"):
                name = name.replace("midlayer.", "layers.0.") if name not in held else name
                assert held[name] == digest(weight), name
    finally:
        engine.shutdown()
