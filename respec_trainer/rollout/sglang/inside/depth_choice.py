"""DepthChooser: chooses the draft steps of every decode batch, by a depth policy, and handles the policy's errors.

Plain Python, without sglang. With tensor parallelism every rank has its own copy, so no choice depends on a clock.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from respec_trainer.errors import ConfigError
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.ends import Ends


class DepthPolicy(Protocol):
    """Interface of depth policies, such as speculation.scheduler.DepthScheduler.

    A policy that learns also has `state()`, which returns JSON values, and `load_state(state)`. One that knows times
    also has `set_graph_sizes(sizes)`, which is called before its first choice, with the batch sizes of CUDA graphs.
    """

    def choose(self, batch: int, context: float, missed: float) -> int:
        """Return the draft steps of the next decode batch. `missed`: mean unread tokens of a sequence."""

    def observe(self, steps: int, batch: int, survivors: Sequence[int], ends: Ends) -> None:
        """Update estimates with the result of a batch of `batch` running sequences.

        survivors[d] of them kept at least d + 1 drafts; [] for steps=0. `ends`: the tokens that responses kept.
        """

    def predicted(self) -> float:
        """Return the expected speed-up of the latest choice over plain decoding."""


class Choice(NamedTuple):
    """Draft steps of one decode batch."""

    steps: int
    warm: bool  # for steps=0: whether the drafter reads this step's tokens at once


class DepthChooser:
    """Chooses by `settings`. A depth policy's error never ends the engine: it is counted, and speculation stays off."""

    def __init__(self, settings: DepthSettings):
        self.settings = settings
        self.failures = 0
        self.states = {0, *settings.candidates}
        self._draws = random.Random(settings.seed)
        self._policy = _make_policy(settings) if settings.mode == "adaptive" else None

    def set_graph_sizes(self, sizes: Sequence[int]) -> None:
        """Tell the depth policy the batch sizes of the engine's CUDA graphs, rising; none without graphs."""
        if hasattr(self._policy, "set_graph_sizes"):
            self._policy.set_graph_sizes(sizes)

    @property
    def failed(self) -> bool:
        return self.failures > 0

    def choose(self, batch: int, context: float, missed: float) -> Choice:
        if self.failed:
            return Choice(0, warm=False)
        if self.settings.mode == "random":
            # Both values of `warm` are drawn, because profiles need the cost of each.
            return Choice(self._draws.choice(self.settings.candidates), warm=self._draws.random() < 0.5)
        steps = self.settings.fixed if self.settings.mode == "fixed" else self._by_policy(batch, context, missed)
        return Choice(steps, warm=self.settings.off == "warm" and not self.failed)

    def predicted(self) -> float:
        if self._policy is None or self.failed:
            return 0.0
        try:
            return float(self._policy.predicted())
        except Exception:  # noqa: BLE001 - see the class
            self.fail()
            return 0.0

    def observe(self, steps: int, batch: int, survivors: Sequence[int], ends: Ends) -> None:
        if self._policy is None or self.failed:
            return
        try:
            self._policy.observe(steps, batch, survivors, ends)
        except Exception:  # noqa: BLE001 - see the class
            self.fail()

    def state(self) -> str:
        """Return the depth policy's state as JSON; "" if it has none or has failed."""
        if self.failed or not hasattr(self._policy, "state"):
            return ""
        try:
            return json.dumps(self._policy.state())
        except Exception:  # noqa: BLE001 - see the class
            self.fail()
            return ""

    def load_state(self, state: str) -> None:
        """Restore the depth policy from `state`. Raises ValueError if there is no depth policy with a state."""
        if not hasattr(self._policy, "load_state"):
            raise ValueError(f"draft steps of mode {self.settings.mode} have no depth policy with a state to restore")
        self._policy.load_state(json.loads(state))

    def fail(self) -> None:
        """Count the exception being handled, and print the first one."""
        self.failures += 1
        if self.failures == 1:
            print("speculation is off from now on, because the depth policy failed:", file=sys.stderr)
            traceback.print_exc(file=sys.stderr)

    def _by_policy(self, batch: int, context: float, missed: float) -> int:
        try:
            steps = self._policy.choose(batch, context, missed)
            if steps not in self.states:
                raise ValueError(f"{steps!r} is not one of the candidate steps {sorted(self.states)}")
            return steps
        except Exception:  # noqa: BLE001 - see the class
            self.fail()
            return 0


def _make_policy(settings: DepthSettings) -> DepthPolicy:
    module, _, name = settings.policy.partition(":")
    try:
        maker = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"policy={settings.policy} is no module:class that can be imported: {error}") from error
    return maker.of(settings)
