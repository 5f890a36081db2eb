"""The alarm of an accept length that falls right after a push."""

from __future__ import annotations


class AcceptAlarm:
    """Compares each step's accept length, in tokens a verify pass, with the one before the last push."""

    def __init__(self, share: float, verified: bool):
        """
        Args:
            share: the part of the drafts accepted a pass (accept length - 1) whose loss raises the alarm.
            verified: whether every push is proved by digests.
        """
        self.share, self.verified = share, verified
        self.before: tuple[float, str] | None = None  # accept length, drafter's version

    def hear(self, accept_length: float, drafter: str) -> str | None:
        """What to tell the user, if drafts accepted a pass fell by more than the share; None if all is well."""
        before, self.before = self.before, (accept_length, drafter)
        if before is None or before[0] - 1 <= 0 or accept_length - 1 >= (1 - self.share) * (before[0] - 1):
            return None
        return (
            f"accept length fell from {before[0]:.2f} to {accept_length:.2f} with the last push, drafts accepted by "
            f"more than {self.share:.0%} (resync.accept_alarm): {self._cause(before[1], drafter)}"
        )

    def _cause(self, before: str, now: str) -> str:
        if not self.verified:
            return "the pushes are not verified, so the drafter may not be what was sent: set resync.verify=checksum"
        if now != before:
            return f"the drafter is what was sent, so {now}, which replaced {before}, drafts worse: see drafter/loss"
        return (
            f"the drafter is still {now}, by its digests, so the policy moved away from it in one update: see "
            "policy/grad_norm and policy/entropy; train the drafter (drafter.weighting) or lower actor.optim.lr"
        )
