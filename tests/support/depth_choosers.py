"""Depth policies for tests, which an engine uses by DepthSettings.policy and policy_options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.ends import Ends


def chosen_by(policy: str, script: Iterable[int]) -> dict[str, Any]:
    """Return the changes to DepthSettings with which a class of this module chooses by `script`."""
    return {"mode": "adaptive", "policy": f"{__name__}:{policy}", "policy_options": {"script": list(script)}}


class Scripted:
    """Chooses the numbers in the option `script`, again and again."""

    def __init__(self, script: tuple[int, ...]):
        self.script, self.turn = script, -1

    @classmethod
    def of(cls, settings: DepthSettings) -> Scripted:
        return cls(tuple(settings.policy_options["script"]))

    def choose(self, batch: int, context: float, missed: float) -> int:
        self.turn += 1
        return self.script[self.turn % len(self.script)]

    def observe(self, steps: int, batch: int, survivors, ends: Ends) -> None:
        assert steps == len(survivors) and all(kept <= batch for kept in survivors)
        assert ends.tokens <= batch + sum(survivors) and 0 <= ends.ended <= batch

    def predicted(self) -> float:
        return 1.5


class Remembering(Scripted):
    """Scripted with a state: after a restore it continues at the same position of its script."""

    def state(self) -> dict:
        return {"turn": self.turn}

    def load_state(self, state: dict) -> None:
        self.turn = state["turn"]


class Unpredictable(Scripted):
    """Raises an error instead of predicting the speed-up of its choice."""

    def predicted(self) -> float:
        raise ZeroDivisionError("a policy's bug")


class Untellable(Remembering):
    """Has a state that cannot be written as JSON."""

    def state(self) -> dict:
        return {"turn": object()}


class Broken(Scripted):
    """Raises an error at the fifth choice."""

    def choose(self, batch: int, context: float, missed: float) -> int:
        if self.turn == 3:
            raise ZeroDivisionError("a policy's bug")
        return super().choose(batch, context, missed)


class Attentive(Scripted):
    """Its state is all that it was told."""

    def __init__(self, script: tuple[int, ...]):
        super().__init__(script)
        self.seen, self.graphs = [], None

    def observe(self, steps: int, batch: int, survivors, ends: Ends) -> None:
        self.seen.append((steps, batch, survivors, ends))

    def state(self) -> dict:
        return {"seen": self.seen, "graphs": self.graphs}

    def set_graph_sizes(self, sizes) -> None:
        self.graphs = list(sizes)
