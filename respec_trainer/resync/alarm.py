"""The alarm of an accept length that falls right after a push."""

from __future__ import annotations

from collections.abc import Sequence


class AcceptAlarm:
    """Compares each step's acceptance with the one before the last push.

    By depth, as accept length also falls where fewer steps are drafted: compared is what chains would come to, in
    tokens a verify pass, that draft as deep as both steps did.
    """

    def __init__(self, share: float, verified: bool):
        """
        Args:
            share: the part of the drafts accepted a pass (accept length - 1) whose loss raises the alarm.
            verified: whether every push is proved by digests.
        """
        self.share, self.verified = share, verified
        self.before: tuple[list[float], str] | None = None  # acceptance by depth, drafter's version

    def check(self, acceptance: Sequence[float], drafter: str) -> str | None:
        """What to tell the user, if drafts accepted a pass fell by more than the share; None if all is well.

        acceptance[d]: the share of drafts kept at depth d + 1, given that those before it were; empty for a step
        without drafts, which says nothing.
        """
        if not acceptance:
            return None
        before, self.before = self.before, (list(acceptance), drafter)
        if before is None:
            return None
        then, now = (_drafts_kept(of[: min(len(acceptance), len(before[0]))]) for of in (before[0], acceptance))
        if then <= 0 or now >= (1 - self.share) * then:
            return None
        return (
            f"accept length fell from {1 + then:.2f} to {1 + now:.2f} with the last push, drafts accepted by "
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


def _drafts_kept(acceptance: Sequence[float]) -> float:
    """Drafts that a chain of this depth keeps a pass."""
    kept = survival = 0.0
    for depth, share in enumerate(acceptance):
        survival = share if depth == 0 else survival * share
        kept += survival
    return kept
