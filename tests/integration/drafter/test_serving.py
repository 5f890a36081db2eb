"""The unrolled drafter makes the same drafts as the engine's drafter, at every depth after the same prefix."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from respec_trainer.config import EngineConfig, SpeculationConfig
from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.drafter.distill import DistillSettings, distill
from respec_trainer.drafter.format import load_drafter, save_drafter
from respec_trainer.drafter.teacher import HFTeacher
from respec_trainer.rollout.sample import BONUS, Request, SamplingParams
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from tests.support.drafters import random_rollouts, target_config, tiny_drafter
from tests.support.processes.forking import planted
from tests.support.rollout_models import VOCAB, save_target

STEPS = 3
# The draft vocabulary leaves out some tokens, so that draft ids differ from target ids.
DRAFT_IDS = torch.tensor([token for token in range(VOCAB) if token not in (4, 50, 90)])
PROMPTS = [(5, 6, 7), (9,), (3, 100, 130, 17, 22, 64, 64, 65)]
PROMPTS += [(*PROMPTS[2], 12, 90, 41)]  # a longer prompt with a prefix that the engine has cached
# Logits differ by about 1. This is a hundred times the difference in rounding between the engine's and torch's kernels.
MARGIN = 1e-3
# Runs in the engine's scheduler: records the drafts of each pass, and the number of tokens before them.
RECORDER = """
import json
import respec_trainer.rollout.sglang.inside.cpu.drafting as drafting

def noted(original, worker, batch, chain=drafting.draft_chain):
    positions = batch.positions.tolist()  # which sglang's own passes count up
    outcome = chain(original, worker, batch)
    with open({log!r}, "a") as log:
        for position, drafts in zip(positions, outcome[2].tolist()):
            log.write(json.dumps([position + 1, drafts]) + "\\n")
    return outcome

drafting.draft_chain = noted
if {stock}:
    drafting.is_simple = lambda *_: False  # sglang's own passes
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make a target, and a drafter that is right often enough for runs of accepted drafts, both in float32."""
    target = save_target(tmp_path_factory.mktemp("serving") / "target", "qwen3")
    drafter = tiny_drafter(target_config(), draft_vocab_size=len(DRAFT_IDS))
    teacher = HFTeacher(target, DRAFT_IDS, drafter.shape.feature_layers)
    settings = DistillSettings(updates=120, batch_size=8, steps=STEPS, lr=5e-3, matrix_lr=5e-2)
    distill(drafter, teacher, random_rollouts([(3, 24)] * 64), settings)
    save_drafter(drafter, DRAFT_IDS, target.parent / "drafter", dtype=torch.float32)
    return target, target.parent / "drafter"


@pytest.fixture(scope="module", params=["short passes", "sglang's passes"])
def served(request, folders, tmp_path_factory):
    """Return (samples, [(tokens known, drafts)] of all passes of each). Requests run one by one, to keep the order."""
    folder = tmp_path_factory.mktemp("plant")
    log, stock = folder / "drafts.jsonl", request.param != "short passes"
    target, drafter = map(str, folders)
    shape = SpeculationConfig(steps=STEPS, topk=1, draft_tokens=STEPS + 1)
    config = EngineConfig(max_total_tokens=4096)
    engine = SGLangEngine(EngineSettings(target, drafter, dtype="fp32", speculation=shape, engine=config, seeded=True))
    with planted(RECORDER.format(log=str(log), stock=stock)):
        engine.start()
    try:
        log.write_text("")  # removes the drafts of the warm-up
        samples, passes = [], []
        for index, prompt in enumerate(PROMPTS):
            params = SamplingParams(32, temperature=0.5, ignore_eos=True, seed=index)
            samples += engine.submit([Request(str(index), prompt, params)]).collect()
            passes.append([tuple(json.loads(line)) for line in log.read_text().splitlines()])
            log.write_text("")
    finally:
        engine.shutdown()
    return samples, passes


@dataclass
class Unrolled:
    """The drafter as in training, on features that transformers computes."""

    drafter: torch.nn.Module
    ids: torch.Tensor
    teacher: HFTeacher

    @torch.no_grad()
    def chain(self, prefix: list[int]) -> list[tuple[int, float]]:
        """The drafts after `prefix`, each after the drafts before it, with their margins over the second choice."""
        tokens, found = list(prefix), []
        for depth in range(STEPS):
            batch = DrafterBatch.collate([(tokens[:1], tokens[1:])])
            target = self.teacher(batch)
            # Serving has no features of its last token and of drafts, so those values must not matter.
            target.features[:, len(prefix) - 1 :] = 7.0
            hidden = list(self.drafter.unroll(target.embeddings, target.features, depth + 1))[depth]
            best = self.drafter.logits(hidden[0, len(prefix) - 2]).topk(2)
            found.append((int(self.ids[best.indices[0]]), float(best.values[0] - best.values[1])))
            tokens.append(found[-1][0])
        return found


@pytest.fixture(scope="module")
def unrolled(folders):
    target, folder = folders
    drafter, ids = load_drafter(folder, target_config())
    return Unrolled(drafter, ids, HFTeacher(target, ids, drafter.shape.feature_layers))


def known_before_passes(sample) -> list[int]:
    """Tokens known before each pass: the prompt and the first one, then a bonus token ends each pass."""
    ends = [i + 1 for i, origin in enumerate(sample.origins) if origin == BONUS and i + 1 < len(sample.origins)]
    return [len(sample.prompt_ids) + known for known in (1, *ends)]


def test_drafts_are_those_of_the_unrolled_drafter(served, unrolled):
    compared = [0] * STEPS
    for sample, passes in zip(*served, strict=True):
        tokens = sample.prompt_ids + sample.response_ids
        starts = known_before_passes(sample)
        # The engine may have drafted once more before it noticed the end.
        assert [known for known, _ in passes[: len(starts)]] == starts
        for known, drafts in passes[: len(starts)]:
            for depth, (draft, lead) in enumerate(unrolled.chain(tokens[:known])):
                if lead < MARGIN:
                    break  # a near tie may go either way, and the later drafts depend on it
                assert drafts[depth] == draft, (known, depth, lead)
                compared[depth] += 1
    assert min(compared) >= 0.9 * sum(len(known_before_passes(sample)) for sample in served[0])


def test_passes_began_after_runs_of_every_length(served):
    """The comparison covers caches with tokens of accepted drafts, recomputed from the target's features."""
    histogram = [0] * (STEPS + 1)
    for sample in served[0]:
        for depth, count in enumerate(sample.accept_histogram):
            histogram[depth] += count
    assert min(histogram) >= 1 and sum(histogram[1:]) >= 10, histogram
