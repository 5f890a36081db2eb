"""trainer.py: requests, scores and refused steps, with stand-ins for the parts that need processes."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from respec_trainer.actor.engine import NonFiniteStep
from respec_trainer.data.prompts import Prompt
from respec_trainer.errors import EngineLostError, TrainingError
from respec_trainer.rewards.contract import RewardItem, Score
from respec_trainer.rollout.batch import collate
from respec_trainer.rollout.sample import Sample
from respec_trainer.trainer import Trainer
from tests.support.configs import smallest_config

PROMPTS = [
    Prompt(key="a", ids=(1, 2), text="A", answer="3", row={"level": 1}),
    Prompt(key="b", ids=(3,), text="B", answer="5"),
]


class Tokenizer:
    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(map(str, row)) for row in rows]


class Actor:
    """A stand-in that raises for the updates listed in `bad`, and otherwise returns a loss."""

    def __init__(self, bad):
        self.bad, self.calls = bad, 0

    def update(self, batch, old, advantages):
        self.calls += 1
        self.given = batch, old, advantages
        if self.calls in self.bad:
            raise NonFiniteStep("loss is nan on rank 1")
        return {"policy/loss": 0.5}


@pytest.fixture
def make(tmp_path):
    def make(bad=()):
        shape = ["run.max_bad_steps=2", "data.prompts_per_step=2", "rollout.sampling.temperature=0.5"]
        saved, said, recorded = [], [], []

        def score(items, group):
            scorer.given = items, group
            return [Score(float(item.response.endswith(item.answer))) for item in items]

        scorer = SimpleNamespace(score=score)
        job = SimpleNamespace(
            config=smallest_config(tmp_path, *shape),
            tokenizer=Tokenizer(),
            scorer=lambda items, group: scorer.score(items, group),
            my_rows=torch.arange,
            actor=Actor(set(bad)),
            report=SimpleNamespace(samples=lambda *a: recorded.append(a), notify=said.append),
            save_bad_batch=lambda *a: saved.append(a) or "folder",
        )
        trainer = Trainer(job)
        trainer.saved, trainer.said, trainer.recorded, trainer.scorer = saved, said, recorded, scorer
        return trainer

    return make


def sample(response):
    return Sample("k", [1], response, [-1.0] * len(response), "stop", "actor-0", "none")


def test_requests_keep_groups_together(make):
    requests = make().requests(4, PROMPTS)
    assert [r.key for r in requests] == ["4:a:0", "4:a:1", "4:b:0", "4:b:1"]
    assert [r.prompt_ids for r in requests] == [(1, 2), (1, 2), (3,), (3,)]
    assert requests[0].sampling.temperature == 0.5 and requests[0].sampling.max_new_tokens == 8


def test_requests_have_the_configured_truncation(make):
    trainer = make()
    sampling = trainer.config.rollout.sampling.model_copy(update={"top_k": 20, "top_p": 0.9})
    rollout = trainer.config.rollout.model_copy(update={"sampling": sampling})
    trainer.config = trainer.config.model_copy(update={"rollout": rollout})
    assert {(r.sampling.top_k, r.sampling.top_p) for r in trainer.requests(4, PROMPTS)} == {(20, 0.9)}


def test_a_prompt_that_comes_twice_in_a_step_draws_other_responses(make):
    trainer = make()
    sampling = trainer.config.rollout.sampling.model_copy(update={"seeded": True})
    rollout = trainer.config.rollout.model_copy(update={"sampling": sampling})
    trainer.config = trainer.config.model_copy(update={"rollout": rollout})
    requests = trainer.requests(4, [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert [r.key for r in requests] == ["4:a:0", "4:a:1", "4:b:0", "4:b:1", "4:a:2", "4:a:3"]
    assert len({r.sampling.seed for r in requests}) == 6


def test_seeds_follow_from_the_run_and_the_request(make):
    plain, other = make(), make()
    assert {r.sampling.seed for r in plain.requests(4, PROMPTS)} == {None}
    sampling = plain.config.rollout.sampling.model_copy(update={"seeded": True})
    rollout = plain.config.rollout.model_copy(update={"sampling": sampling})
    plain.config = plain.config.model_copy(update={"rollout": rollout})
    other.config = plain.config.model_copy(update={"run": plain.config.run.model_copy(update={"seed": 1})})
    seeds = [r.sampling.seed for r in plain.requests(4, PROMPTS)]
    assert seeds == [r.sampling.seed for r in plain.requests(4, PROMPTS)]
    assert seeds[0] == 20407838513334143, "the same on every machine, so that a run can be repeated"
    others = [r.sampling.seed for r in plain.requests(5, PROMPTS) + other.requests(4, PROMPTS)]
    assert len({*seeds, *others}) == 12 and all(0 <= seed < 2**63 for seed in seeds)


def test_each_sample_is_scored_against_its_own_prompt(make):
    samples = [sample([7, 3]), sample([5]), sample([3]), sample([1, 5])]
    rewards = make().score(0, samples, PROMPTS)
    assert rewards.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert [s.reward for s in samples] == [1.0, 0.0, 0.0, 1.0]


def test_a_reward_is_given_what_is_known_of_a_sample(make):
    trainer = make()
    cut = replace(sample([1, 5]), finish_reason="length")
    samples = [sample([7, 3]), sample([5]), sample([3]), cut]
    trainer.score(3, samples, PROMPTS)
    items, group = trainer.scorer.given
    assert group == 2 and len(items) == 4
    assert items[0] == RewardItem("A", "7 3", (7, 3), truncated=False, answer="3", row={"level": 1})
    assert items[3] == RewardItem("B", "1 5", (1, 5), truncated=True, answer="5", row={})
    ((step, recorded, texts),) = trainer.recorded
    assert (step, recorded, texts) == (3, samples, [("A", "7 3"), ("A", "5"), ("B", "3"), ("B", "1 5")])


def test_skipped_samples_have_no_reward_and_parts_are_kept(make):
    trainer = make()
    trainer.scorer.score = lambda items, group: [Score(0.1, {"format": 1.0}), None, None, Score(2.0)]
    samples = [sample([7, 3]), sample([5]), sample([3]), sample([1, 5])]
    rewards = trainer.score(0, samples, PROMPTS)
    assert rewards.dtype == torch.float32 and rewards.isnan().tolist() == [[False, True], [True, False]]
    assert [s.reward for s in samples] == [0.1, None, None, 2.0]
    assert [s.reward_parts for s in samples] == [{"format": 1.0}, {}, {}, {}]


def test_skipped_samples_have_no_tokens_in_the_update(make):
    trainer = make()
    batch = collate([sample([7, 3]), sample([5]), sample([3]), sample([1, 5])], pad_id=0)
    old, advantages = torch.zeros(batch.tokens.shape), torch.arange(6.0)
    trainer.job.my_rows = lambda total: slice(2, total)
    scored = torch.tensor([False, True, True, False, True, True])
    trainer.train(0, batch, old, advantages, scored)
    given, given_old, given_advantages = trainer.job.actor.given
    assert given.response_mask.sum(1).tolist() == [2, 0, 1, 2] and batch.response_mask.sum() == 6
    assert torch.equal(given.tokens, batch.tokens) and torch.equal(given.lengths, batch.lengths)
    assert given_old is old and given_advantages.tolist() == [2.0, 3.0, 4.0, 5.0]


def test_a_step_of_which_nothing_was_scored_is_refused(make):
    trainer = make()
    arguments = "batch", torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, dtype=torch.bool)
    assert trainer.train(0, *arguments) == {"policy/refused": 1}
    assert trainer.said == ["step 1 refused: the reward skipped every sample, so there is nothing to train on"]
    assert trainer.job.actor.calls == 0 and not trainer.saved
    with pytest.raises(TrainingError, match="2 refused steps in a row .*the reward skipped every sample"):
        trainer.train(1, *arguments)


def test_a_refused_step_is_saved_and_reported(make):
    trainer = make(bad=[1])
    zeros = torch.zeros(2, 3)
    assert trainer.update(0, "batch", zeros, zeros[:, 0]) == {"policy/refused": 1}
    assert len(trainer.saved) == 1 and trainer.saved[0][0] == 0
    assert "step 1 refused" in trainer.said[0] and "nan on rank 1" in trainer.said[0]
    assert trainer.update(1, "batch", zeros, zeros[:, 0]) == {"policy/loss": 0.5, "policy/refused": 0}


def test_refused_steps_in_a_row_stop_the_run(make):
    trainer = make(bad=[1, 3, 4])  # the good update between them resets the count
    zeros = torch.zeros(2, 3)
    for step in range(3):
        trainer.update(step, "batch", zeros, zeros[:, 0])
    with pytest.raises(TrainingError, match="2 refused steps in a row"):
        trainer.update(3, "batch", zeros, zeros[:, 0])
    assert len(trainer.saved) == 3


def test_an_actor_whose_engines_keep_dying_is_exported(make):
    trainer = make()
    exported = []

    def push():
        raise EngineLostError("3 restarts were not enough")

    trainer.job.generation = SimpleNamespace(push=push)
    trainer.job.resume = lambda trainer: 0
    trainer.job.clock = lambda name: contextlib.nullcontext()
    trainer.job.export = lambda: exported.append(1) or "runs/x/actor"
    with pytest.raises(EngineLostError, match="3 restarts were not enough; the current actor is saved in runs/x/actor"):
        trainer.run()
    assert exported
