"""Audit a training step's own rollouts: test every response token against its law under the actor.

The audit draws no samples of its own. No two tokens share a law, so it tests the sums of their scores (scores.py):
classes of rank, and surprisal. Verification that accepts too much, or too little, moves mass between the first ranks
and the rest.

Engine and actor round differently, and a response may be of older weights than the actor's. So a token counts with the
ratio of its probability under the actor to that which the engine drew it with. That makes the expectation exact, and is
itself tested: the ratios average 1 if the engine reports the probabilities that it draws with.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from respec_trainer.actor.engine import Actor
from respec_trainer.audit.law import laws
from respec_trainer.audit.scores import Draws, Strata, strata
from respec_trainer.audit.sums import ScoreSums
from respec_trainer.collectives import sum_over
from respec_trainer.config import Config
from respec_trainer.errors import AuditError, ConfigError
from respec_trainer.rollout.batch import Batch
from respec_trainer.rollout.sample import SamplingParams
from respec_trainer.speculation.algorithms import is_lossy

ROWS = 16  # responses in a pass, whose logits are in memory at once
ELEMENTS = 2**25  # probabilities, tokens times vocabulary, that are sorted at once
# Probability that one test fails a correct run: small, because a run has many audits and a failure ends it.
LEVEL = 1e-6


class StepAudit:
    """Audits every `rollout.audit_every`-th step. Collective: every rank must call it."""

    def __init__(self, config: Config, actor: Actor):
        self.every, self.actor = config.rollout.audit_every, actor
        self.lossy = is_lossy(config.speculation) or config.rollout.sampling.untruncated
        self.total: Strata | None = None  # sums of all audits so far, which detect smaller errors than one audit
        sampling = config.rollout.sampling
        self.params = SamplingParams(sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k)

    def __call__(self, step: int, batch: Batch) -> dict[str, float]:
        """Audit the rows of all data-parallel ranks; return `audit/*` metrics, or {} on a step without an audit.

        All rows count, those too that the reward skipped: which they are depends on their tokens.

        Raises AuditError on every rank if the rows do not follow the actor's law, unless the configuration allows lossy
        speculation.
        """
        if not self.every or step % self.every:
            return {}
        sums = self._over_copies(self._sums(batch))
        self.total = sums if self.total is None else self.total + sums
        if not self.lossy:
            for some, which in ((sums, f"step {step + 1}"), (self.total, f"the audits up to step {step + 1}")):
                check(some, which)
        return {
            "audit/p_value": sums.both().p_value,
            "audit/p_value_run": self.total.both().p_value,
            "audit/total_variation": self.total.uncertain.total_variation,
            "audit/power": self.total.uncertain.power(0.02, LEVEL, self.total.both().df),
            "audit/mean_ratio": self.total.whole.mean_ratio,
            "audit/tokens": sums.whole.draws,
        }

    def state_dict(self) -> dict:
        """Return the sums of all audits so far as JSON data, equal on every rank."""
        return {"total": {} if self.total is None else self.total.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore the sums. Raises ConfigError for a state of an earlier version, which summed other scores."""
        if state["total"] and state["total"].keys() != Strata.__dataclass_fields__.keys():
            raise ConfigError(
                "the checkpoint's sums of audits were saved by another version of respec_trainer, which this one does "
                "not read; finish that run with the version that began it, or start a new one with "
                "checkpoint.resume=never"
            )
        self.total = Strata.of_state(state["total"]) if state["total"] else None

    def _sums(self, batch: Batch) -> Strata:
        parts = [self._part(batch.rows(slice(start, start + ROWS))) for start in range(0, len(batch), ROWS)]
        return sum(parts[1:], parts[0])

    def _part(self, rows: Batch) -> Strata:
        logits = self.actor.logits_at(rows.tokens, rows.response_mask.roll(-1, 1)).cpu()
        tokens = rows.tokens[rows.response_mask].cpu()
        sampler = rows.sampler_logprobs[rows.response_mask].cpu().double()
        size = max(1, ELEMENTS // logits.shape[1])
        parts = [self._scores(*some) for some in zip(*(x.split(size) for x in (logits, tokens, sampler)), strict=True)]
        return sum(parts[1:], parts[0])

    def _scores(self, logits: torch.Tensor, tokens: torch.Tensor, sampler: torch.Tensor) -> Strata:
        some, rows = laws(logits, self.params), torch.arange(len(tokens))
        ratios = (some.probs[rows, tokens].log() - sampler).exp()
        return strata(some, Draws(rows, tokens, torch.ones_like(ratios), ratios))

    def _over_copies(self, sums: Strata) -> Strata:
        topology = self.actor.topology
        return Strata(*(over_ranks(part, topology.device, topology.dp_group) for part in vars(sums).values()))


def over_ranks(sums: ScoreSums, device: torch.device, group: dist.ProcessGroup | None) -> ScoreSums:
    """Add the sums of all ranks."""
    added = sum_over([torch.as_tensor(part) for part in vars(sums).values()], device, group)
    return ScoreSums(*(part.numpy() if part.ndim else float(part) for part in added))


def check(sums: Strata, which: str) -> None:
    """Raise AuditError if `sums`, which are of the rollouts of `which`, refute that these follow the actor's law."""
    evidence, hint = sums.both(), "run tools/audit_rollout.py to see which way of sampling is wrong"
    if evidence.p_value < LEVEL:
        raise AuditError(
            f"the rollouts of {which} do not follow the policy: p = {evidence.p_value:.1g}, chi-square "
            f"{evidence.statistic:.0f} with {evidence.df} degrees of freedom over {evidence.draws:.0f} tokens; {hint}"
        )
    if sums.whole.ratio_p_value() < LEVEL:
        raise AuditError(
            f"the rollouts of {which} have log-probs that they were not drawn with: the probabilities of actor to "
            f"sampler average {sums.whole.mean_ratio:.4f}, not 1, over {sums.whole.draws:.0f} tokens; {hint}"
        )
