"""audit/rollouts.py on two data-parallel ranks: an actor with a known law, and samples that follow it or do not."""

from __future__ import annotations

import math

import pytest

from tests.support.configs import smallest_config
from tests.support.processes.ranks import run_ranks

VOCAB, ROWS, TOKENS = 11, 64, 40
RIGHT = {"greedy_share": 0.0}


def audits(config, cases: dict[str, dict]) -> dict[str, dict | str]:
    """Audit each case: a step with four rows, and then a step of ROWS rows; half of them on each rank.

    Returns this rank's metrics or error of the second step, by case; its metrics have the state after it, `state`, and
    what an audit says that goes on from that state and sees the second step's rows once more, `again`.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    return {name: audit(config, generator, **case) for name, case in cases.items()}


def audit(config, generator, **case) -> dict | str:
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from respec_trainer.audit.rollouts import StepAudit
    from respec_trainer.errors import AuditError
    from respec_trainer.rollout.batch import collate

    table = 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))  # the last token decides

    class Actor:
        topology = SimpleNamespace(dp_group=dist.group.WORLD, device=torch.device("cpu"))

        def logits_at(self, tokens, wanted):
            return table[tokens[wanted]]

    samples = draw(table, config.rollout.sampling, generator, **case)
    first, second = StepAudit(config, Actor()), StepAudit(config, Actor())
    try:
        first(0, collate(samples[:2], 0))
        metrics = first(3, collate(samples[2:], 0))
        if metrics:
            state = first.state_dict()
            second.load_state_dict(state)
            metrics |= {"state": state, "again": second(6, collate(samples[2:], 0))}
        return metrics
    except AuditError as error:
        return str(error)


def draw(
    table,
    sampling,
    generator,
    greedy_share: float = 0.0,
    stale: float = 0.0,
    says: str = "what it draws with",
    off: float = 0.0,
) -> list:
    """Draw this rank's samples; `stale` is the error of the sampler's logits, `off` is added to the log-probs."""
    import torch

    from respec_trainer.audit.law import shaped
    from respec_trainer.rollout.sample import Sample, SamplingParams

    params = SamplingParams(TOKENS, sampling.temperature, sampling.top_p, sampling.top_k)
    actors = shaped(table, params)
    own = shaped(table + stale * torch.randn(table.shape, generator=torch.Generator().manual_seed(2)), params)
    samples = []
    for _ in range(ROWS // 2 + 2):
        row, logprobs = [0], []
        for _ in range(TOKENS):
            law = own[row[-1]]
            drawn = int(torch.multinomial(law, 1, generator=generator))
            greedy = float(torch.rand((), generator=generator)) < greedy_share
            token = int(law.argmax()) if greedy else drawn
            said = law if says == "what it draws with" else actors[row[-1]]
            logprobs.append(float(said[token].log()) + off)
            row.append(token)
        # Prompts of different lengths, so that rows begin and end at different positions.
        prompt = [3] * (len(samples) % 5) + [0]
        samples.append(Sample("k", prompt, row[1:], logprobs, "length", "a", "d"))
    return samples


def config_for(folder, *overrides: str):
    return smallest_config(folder, "rollout.audit_every=3", "rollout.sampling.temperature=0.7", *overrides)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    cases = {
        "right": RIGHT,
        "greedy": {"greedy_share": 0.25},
        "stale": {"stale": 0.7},
        "stale, with the log-probs of the actor": {"stale": 0.7, "says": "the actor's"},
        "other log-probs": {"off": math.log(0.95)},
        "not a number": {"off": math.nan},
    }
    first, second = run_ranks(2, audits, config_for(tmp_path_factory.mktemp("audit")), cases)
    assert str(first) == str(second), "the ranks disagree"
    return first


def test_rollouts_of_the_law_pass(outcomes):
    metrics = outcomes["right"]
    assert metrics["audit/tokens"] == ROWS * TOKENS
    assert min(metrics["audit/p_value"], metrics["audit/p_value_run"]) > 1e-3 and 0 < metrics["audit/power"] < 1
    assert metrics["audit/mean_ratio"] == pytest.approx(1)


def test_rollouts_of_older_weights_pass_with_the_log_probs_that_they_were_drawn_with(outcomes):
    metrics = outcomes["stale"]
    assert min(metrics["audit/p_value"], metrics["audit/p_value_run"]) > 1e-3
    assert metrics["audit/mean_ratio"] != 1 and metrics["audit/mean_ratio"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("case", ["greedy", "stale, with the log-probs of the actor"])
def test_rollouts_of_another_law_end_the_run_on_every_rank(outcomes, case):
    assert "step 4 do not follow the policy" in outcomes[case]


def test_log_probs_that_were_not_drawn_with_end_the_run(outcomes):
    assert "have log-probs that they were not drawn with" in outcomes["other log-probs"]
    assert "average 1.0526" in outcomes["other log-probs"]
    assert "average nan" in outcomes["not a number"]


def test_an_audit_goes_on_from_its_state(outcomes):
    """The sums are those of both ranks and of all audits so far."""
    total, again = outcomes["right"]["state"]["total"], outcomes["right"]["again"]
    assert (
        sum(part["draws"] for part in total.values()) == (ROWS + 4) * TOKENS and again["audit/tokens"] == ROWS * TOKENS
    )
    assert again["audit/p_value"] == pytest.approx(outcomes["right"]["audit/p_value"])
    assert again["audit/p_value_run"] != pytest.approx(again["audit/p_value"])
    assert again["audit/power"] > outcomes["right"]["audit/power"]


@pytest.mark.parametrize("cut", ["rollout.sampling.top_p=0.95", "rollout.sampling.top_k=4"])
def test_what_is_cut_is_audited(tmp_path, cut):
    cases = {"right": {"stale": 0.05}, "greedy": {"greedy_share": 0.25}}
    first, _ = run_ranks(2, audits, config_for(tmp_path, cut), cases)
    assert 1e-3 < first["right"]["audit/p_value_run"] < 1 and "do not follow the policy" in first["greedy"]


def test_lossy_speculation_is_measured_and_goes_on(tmp_path):
    shape = ["speculation.algorithm=eagle3", "speculation.allow_lossy=true", "speculation.accept_threshold_acc=0.5"]
    first, _ = run_ranks(2, audits, config_for(tmp_path, *shape, "drafter.path=d"), {"greedy": {"greedy_share": 0.25}})
    assert first["greedy"]["audit/p_value"] < 1e-6 and first["greedy"]["audit/total_variation"] > 0.02


@pytest.mark.parametrize("every", [0, 2])
def test_other_steps_are_not_audited(tmp_path, every):
    config = config_for(tmp_path, f"rollout.audit_every={every}")
    assert run_ranks(2, audits, config, {"greedy": {"greedy_share": 0.25}})[0] == {"greedy": {}}
