"""Audit a training step's own rollouts: test every response token against its law under the actor.

The audit draws no samples of its own. No two tokens share a law, so each law is divided into classes by rank: the
likeliest token, the second, the third, the fourth to eighth, and the rest. The count of draws in each class must agree
with the sum of its probabilities. Verification that accepts too much, or too little, moves mass between the first ranks
and the rest.

The engine and the actor round differently, but their errors favor no rank and cancel.
"""

from __future__ import annotations

import numpy as np
import torch

from respec_trainer.actor.engine import Actor
from respec_trainer.audit.law import shaped
from respec_trainer.audit.statistics import ClassSums
from respec_trainer.collectives import sum_over
from respec_trainer.config import Config
from respec_trainer.errors import AuditError
from respec_trainer.rollout.batch import Batch
from respec_trainer.rollout.sample import SamplingParams
from respec_trainer.speculation.algorithms import is_lossy

FIRST_RANKS = (0, 1, 2, 3, 8)  # the first rank of each class
ROWS = 16  # responses in a pass, whose logits are in memory at once
# Probability that one audit fails a correct run: small, because a run has many audits and a failure ends it.
LEVEL = 1e-6


class StepAudit:
    """Audits every `rollout.audit_every`-th step. Collective: every rank must call it."""

    def __init__(self, config: Config, actor: Actor):
        self.every, self.actor = config.rollout.audit_every, actor
        self.lossy = is_lossy(config.speculation) or config.rollout.sampling.untruncated
        self.total: ClassSums | None = None  # sums of all audits so far, which detect smaller errors than one audit
        sampling = config.rollout.sampling
        self.params = SamplingParams(sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k)

    def __call__(self, step: int, batch: Batch) -> dict[str, float]:
        """Audit the rows of all data-parallel ranks; return `audit/*` metrics, or {} on a step without an audit.

        Raises AuditError on every rank if the rows do not follow the actor's law, unless the configuration allows lossy
        speculation.
        """
        if not self.every or step % self.every:
            return {}
        sums = self._over_copies(self._sums(batch))
        self.total = sums if self.total is None else self.total + sums
        this_step, all_audits = sums.evidence(), self.total.evidence()
        for evidence, which in ((this_step, f"step {step + 1}"), (all_audits, f"the audits up to step {step + 1}")):
            if evidence.p_value < LEVEL and not self.lossy:
                raise AuditError(
                    f"the rollouts of {which} do not follow the policy: p = {evidence.p_value:.1g}, chi-square "
                    f"{evidence.statistic:.0f} with {evidence.df} degrees of freedom over {evidence.draws} tokens; "
                    "run tools/audit_rollout.py to see which way of sampling is wrong"
                )
        return {
            "audit/p_value": this_step.p_value,
            "audit/p_value_run": all_audits.p_value,
            "audit/total_variation": all_audits.total_variation,
            "audit/power": all_audits.power(0.02, LEVEL),
            "audit/tokens": this_step.draws,
        }

    def state_dict(self) -> dict:
        """Return the sums of all audits so far as JSON data, equal on every rank."""
        total = self.total
        arrays = {} if total is None else {name: np.asarray(value).tolist() for name, value in vars(total).items()}
        return {"total": arrays}

    def load_state_dict(self, state: dict) -> None:
        total = state["total"]
        arrays = {name: np.asarray(value) if isinstance(value, list) else value for name, value in total.items()}
        self.total = ClassSums(**arrays) if arrays else None

    def _sums(self, batch: Batch) -> ClassSums:
        drawn, masses = [], []
        for start in range(0, len(batch), ROWS):
            rows = batch.rows(slice(start, start + ROWS))
            logits = self.actor.logits_at(rows.tokens, rows.response_mask.roll(-1, 1)).cpu()
            tokens = rows.tokens[rows.response_mask].cpu()
            some_drawn, some_masses = rank_classes(shaped(logits, self.params), tokens)
            drawn.append(some_drawn)
            masses.append(some_masses)
        return ClassSums.of(torch.cat(drawn).numpy(), torch.cat(masses).numpy())

    def _over_copies(self, sums: ClassSums) -> ClassSums:
        parts = [torch.as_tensor(part) for part in (sums.seen, sums.expected, sums.products, sums.draws)]
        topology = self.actor.topology
        *arrays, draws = sum_over(parts, topology.device, topology.dp_group)
        return ClassSums(*(array.numpy() for array in arrays), int(draws))


def rank_classes(probs: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the class of each of T tokens in its law, [T], and each law's probability of each class, [T, C].

    probs: [T, V] float64. tokens: [T].
    """
    ordered, order = probs.sort(stable=True, dim=-1, descending=True)
    rank = (order == tokens[:, None]).int().argmax(-1)
    firsts = [first for first in FIRST_RANKS if first < probs.shape[-1]]
    before = torch.nn.functional.pad(ordered.cumsum(-1), (1, 0))[:, [*firsts, -1]]
    return torch.bucketize(rank, torch.tensor(firsts), right=True) - 1, before.diff(dim=-1)
