"""Policies of draft steps that tests put into an engine, by DepthSettings.policy and policy_options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from respec_trainer.rollout.decode_log import DepthSettings


def chosen_by(policy: str, script: Iterable[int]) -> dict[str, Any]:
    """The changes to DepthSettings that have a class of this module choose by `script`."""
    return {"mode": "adaptive", "policy": f"{__name__}:{policy}", "policy_options": {"script": list(script)}}


class Scripted:
    """The numbers in the option `script`, over and over."""

    def __init__(self, script: tuple[int, ...]):
        self.script, self.turn = script, -1

    @classmethod
    def of(cls, settings: DepthSettings) -> Scripted:
        return cls(tuple(settings.policy_options["script"]))

    def choose(self, batch: int, context: float, missed: float) -> int:
        self.turn += 1
        return self.script[self.turn % len(self.script)]

    def observe(self, steps: int, batch: int, survivors) -> None:
        assert steps == len(survivors) and all(kept <= batch for kept in survivors)

    def predicted(self) -> float:
        return 1.5


class Remembering(Scripted):
    """Scripted, and goes on in its script where another was."""

    def state(self) -> dict:
        return {"turn": self.turn}

    def load_state(self, state: dict) -> None:
        self.turn = state["turn"]


class Unpredictable(Scripted):
    """Raises when it is asked what it expects of its choice."""

    def predicted(self) -> float:
        raise ZeroDivisionError("a policy's bug")


class Untellable(Remembering):
    """Has a state that JSON does not know."""

    def state(self) -> dict:
        return {"turn": object()}


class Broken(Scripted):
    """Raises at the fifth choice."""

    def choose(self, batch: int, context: float, missed: float) -> int:
        if self.turn == 3:
            raise ZeroDivisionError("a policy's bug")
        return super().choose(batch, context, missed)
