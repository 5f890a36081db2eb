"""DepthChooser: asks the policy for draft steps before every decode batch, and keeps the engine alive if it fails.

Plain Python, no engine. With tensor parallelism every rank asks its own copy: nothing here depends on a clock.
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


class DepthPolicy(Protocol):
    """speculation.scheduler.DepthScheduler, or one like it.

    One that learns has `state()`, which is JSON, and `load_state(state)` besides.
    """

    def choose(self, batch: int, context: float, missed: float) -> int:
        """Draft steps for the next decode batch; `missed`: mean tokens of a sequence that the drafter has not read."""

    def observe(self, steps: int, batch: int, survivors: Sequence[int]) -> None:
        """survivors[d] = sequences that kept at least d + 1 drafts; [] for steps=0."""

    def predicted(self) -> float:
        """Speed-up over plain decoding that it expects of the latest choice."""


class Choice(NamedTuple):
    steps: int
    warm: bool  # of steps=0: whether the drafter reads this step's tokens at once


class DepthChooser:
    """Chooses by `settings`. A policy's error never reaches the engine: it is counted, and speculation stays off."""

    def __init__(self, settings: DepthSettings):
        self.settings = settings
        self.failures = 0
        self.states = {0, *settings.candidates}
        self._draws = random.Random(settings.seed)
        self._policy = _make_policy(settings) if settings.mode == "adaptive" else None

    @property
    def failed(self) -> bool:
        return self.failures > 0

    def choose(self, batch: int, context: float, missed: float) -> Choice:
        if self.failed:
            return Choice(0, warm=False)
        if self.settings.mode == "random":
            # Both ways of being off are drawn: profiles have to know what each costs.
            return Choice(self._draws.choice(self.settings.candidates), warm=self._draws.random() < 0.5)
        steps = self.settings.fixed if self.settings.mode == "fixed" else self._ask(batch, context, missed)
        return Choice(steps, warm=self.settings.off == "warm" and not self.failed)

    def predicted(self) -> float:
        if self._policy is None or self.failed:
            return 0.0
        try:
            return float(self._policy.predicted())
        except Exception:  # noqa: BLE001 - see the class
            self.fail()
            return 0.0

    def observe(self, steps: int, batch: int, survivors: Sequence[int]) -> None:
        if self._policy is None or self.failed:
            return
        try:
            self._policy.observe(steps, batch, survivors)
        except Exception:  # noqa: BLE001 - see the class
            self.fail()

    def state(self) -> str:
        """What the policy has learnt, as JSON; "" where it learns nothing, or failed."""
        if self.failed or not hasattr(self._policy, "state"):
            return ""
        try:
            return json.dumps(self._policy.state())
        except Exception:  # noqa: BLE001 - see the class
            self.fail()
            return ""

    def load_state(self, state: str) -> None:
        """Let the policy go on from a `state`. Raises ValueError for one that learns nothing."""
        if not hasattr(self._policy, "load_state"):
            raise ValueError(f"steps of mode {self.settings.mode} have no policy that could go on from a state")
        self._policy.load_state(json.loads(state))

    def fail(self) -> None:
        """Count the error being handled; the first is shown."""
        self.failures += 1
        if self.failures == 1:
            print("speculation goes off: the policy of its steps failed", file=sys.stderr)
            traceback.print_exc(file=sys.stderr)

    def _ask(self, batch: int, context: float, missed: float) -> int:
        try:
            steps = self._policy.choose(batch, context, missed)
            if steps not in self.states:
                raise ValueError(f"{steps!r} is none of the candidate steps {sorted(self.states)}")
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
