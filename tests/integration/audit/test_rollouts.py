"""audit/rollouts.py on two data-parallel ranks: an actor with a known law, and samples that follow it or do not."""

from __future__ import annotations

import pytest

from tests.support.configs import smallest_config
from tests.support.processes.ranks import run_ranks

VOCAB, ROWS, TOKENS = 11, 64, 40


def audit(config, greedy_share: float) -> dict | str:
    """Audit half of the rows on each rank; return this rank's metrics or error."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from respec_trainer.audit.rollouts import StepAudit
    from respec_trainer.errors import AuditError
    from respec_trainer.rollout.batch import collate
    from respec_trainer.rollout.sample import Sample

    dist.init_process_group("gloo")
    table = 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))  # the last token decides

    class Actor:
        topology = SimpleNamespace(dp_group=dist.group.WORLD, device=torch.device("cpu"))

        def logits_at(self, tokens, wanted):
            return table[tokens[wanted]]

    generator = torch.Generator().manual_seed(dist.get_rank())
    samples = []
    for _ in range(ROWS // 2 + 2):
        row = [0]
        for _ in range(TOKENS):
            law = (table[row[-1]] / config.rollout.sampling.temperature).softmax(-1)
            drawn = int(torch.multinomial(law, 1, generator=generator))
            greedy = float(torch.rand((), generator=generator)) < greedy_share
            row.append(int(law.argmax()) if greedy else drawn)
        samples.append(Sample("k", [0], row[1:], [0.0] * TOKENS, "length", "a", "d"))
    try:
        audit = StepAudit(config, Actor())
        audit(0, collate(samples[:2], 0))
        return audit(3, collate(samples[2:], 0))
    except AuditError as error:
        return str(error)


def config_for(folder, *overrides: str):
    return smallest_config(folder, "rollout.audit_every=3", "rollout.sampling.temperature=0.7", *overrides)


def test_rollouts_of_the_law_pass(tmp_path):
    first, second = run_ranks(2, audit, config_for(tmp_path), 0.0)
    assert first == second and first["audit/tokens"] == ROWS * TOKENS
    assert min(first["audit/p_value"], first["audit/p_value_run"]) > 1e-3 and 0 < first["audit/power"] < 1


def test_rollouts_of_another_law_end_the_run_on_every_rank(tmp_path):
    first, second = run_ranks(2, audit, config_for(tmp_path), 0.25)
    assert first == second and "step 4 do not follow the policy" in first


def test_lossy_speculation_is_measured_and_goes_on(tmp_path):
    shape = ["speculation.algorithm=eagle3", "speculation.allow_lossy=true", "speculation.accept_threshold_acc=0.5"]
    first, _ = run_ranks(2, audit, config_for(tmp_path, *shape, "drafter.path=d"), 0.25)
    assert first["audit/p_value"] < 1e-6


@pytest.mark.parametrize("every", [0, 2])
def test_other_steps_are_not_audited(tmp_path, every):
    config = config_for(tmp_path, f"rollout.audit_every={every}")
    assert run_ranks(2, audit, config, 0.25) == [{}, {}]
