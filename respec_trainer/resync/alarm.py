"""The alarm for an accept length that falls right after a push."""

from __future__ import annotations

from collections.abc import Sequence


class AcceptAlarm:
    """Compares each step's acceptance with that before the last push.

    Accept length also falls when fewer draft steps are used. So the comparison uses acceptance by depth: the expected
    tokens in one verify pass of chains of the depth that both steps have.
    """

    def __init__(self, share: float, verified: bool):
        """
        Args:
            share: the alarm is raised if accepted drafts in one pass (accept length - 1) fall by this share.
            verified: whether digests verify every push.
        """
        self.share, self.verified = share, verified
        self.before: tuple[list[float], str] | None = None  # acceptance by depth, drafter's version

    def check(self, acceptance: Sequence[float], drafter: str) -> str | None:
        """Return a message for the user if accepted drafts in one pass fell by more than the share, or None.

        Args:
            acceptance: entry d is the share of drafts accepted at depth d + 1, given that all earlier ones were; empty
                for a step without drafts, which is ignored.
            drafter: the drafter's version.
        """
        if not acceptance:
            return None
        before, self.before = self.before, (list(acceptance), drafter)
        if before is None:
            return None
        depth = min(len(acceptance), len(before[0]))
        then, now = _drafts_accepted(before[0][:depth]), _drafts_accepted(acceptance[:depth])
        if now >= (1 - self.share) * then:
            return None
        return (
            f"accept length fell from {1 + then:.2f} to {1 + now:.2f} with the last push, accepted drafts by "
            f"more than {self.share:.0%} (resync.accept_alarm): {self._cause(before[1], drafter)}"
        )

    def state_dict(self) -> dict:
        return {"before": self.before}

    def load_state_dict(self, state: dict) -> None:
        self.before = tuple(state["before"]) if state["before"] else None

    def _cause(self, before: str, now: str) -> str:
        if not self.verified:
            return "the pushes are not verified, so the drafter may not be what was sent: set resync.verify=checksum"
        if now != before:
            return f"the drafter is what was sent, so {now}, which replaced {before}, drafts worse: see drafter/loss"
        return (
            f"the drafter is still {now}, by its digests, so the policy moved away from it in one update: see "
            "policy/grad_norm and policy/entropy; train the drafter (drafter.weighting) or lower actor.optim.lr"
        )


def _drafts_accepted(acceptance: Sequence[float]) -> float:
    """Return the expected number of accepted drafts in one pass of a chain: sum over d of prod over i <= d of a_i."""
    expected = survival = 0.0
    for depth, share in enumerate(acceptance):
        survival = share if depth == 0 else survival * share
        expected += survival
    return expected
