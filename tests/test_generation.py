"""generation.py: the order in which engines and actor use the GPU's memory, and the effect of a failed proof."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from respec_trainer.errors import EngineLostError, ProofError
from respec_trainer.generation import Generation
from respec_trainer.resync.canary import Canary, Continuation
from respec_trainer.rollout.sample import Sample


class Recorder:
    """A stand-in that logs every method call with its arguments; `results`: what some methods return or raise."""

    def __init__(self, name, log, **results):
        self._name, self._log, self._results = name, log, results

    def __getattr__(self, method):
        def call(*args, **kwargs):
            words = [str(a) for a in args] + [f"{k}={v}" for k, v in kwargs.items()]
            self._log.append(" ".join([f"{self._name}.{method}", *words]))
            result = self._results.get(method)
            result = result.pop(0) if isinstance(result, list) and result else result
            if isinstance(result, Exception):
                raise result
            return result

        return call


def make(canary=None, max_restarts=1, sleeps=True, fleet=(), resync=()):
    log, said = [], []
    engines = Recorder("fleet", log, **dict(fleet))
    engines.sleeps = sleeps
    actor = Recorder("actor", log, generate_greedy=([[7]], [[-0.5]]))
    rollouts = Generation(engines, Recorder("resync", log, **dict(resync)), actor, max_restarts, said.append, canary)
    return SimpleNamespace(rollouts=rollouts, log=log, said=said)


def test_engine_and_actor_take_turns():
    case = make()
    case.rollouts.push()
    case.rollouts.sleep()
    assert case.log == [
        "fleet.check",
        "actor.onload weights",
        "actor.offload optimizer",
        "fleet.wake weights",
        "resync.push True prove=False",
        "actor.offload weights",
        "fleet.wake kv_cache",
        "fleet.sleep",
        "actor.onload",
    ]


def test_an_engine_that_keeps_its_weights_is_pushed_what_changed():
    case = make(sleeps=False)
    case.rollouts.push()
    assert "resync.push False prove=False" in case.log


def test_the_canary_is_compared_last():
    sample = Sample("canary", [1], [7], [-0.502], "length", "actor-1", "drafter-1")
    case = make(Canary([1], 1, tolerance=0.01), fleet={"ask_each": [[sample]], "take_counts": [dict.fromkeys(
        ("restarts", "lost_tokens", "resumed_tokens"), 0)]}, resync={"take_bytes": [5]})  # fmt: skip
    case.rollouts.push()
    assert case.log[3] == "actor.generate_greedy [(1,)] 1", "while the actor's weights are there"
    assert case.log[-2] == "fleet.wake kv_cache" and case.log[-1].startswith("fleet.ask_each")
    metrics = case.rollouts.metrics()
    assert metrics["resync/canary_error"] == pytest.approx(0.002) and metrics["resync/bytes"] == 5


def test_other_log_probs_forbid_generation():
    wrong = Sample("canary", [1], [9], [-3.0], "length", "actor-1", "drafter-1")
    case = make(Canary([1], 1, tolerance=0.01), fleet={"ask_each": [[wrong]]})
    with pytest.raises(ProofError, match="log-probs are not the actor"):
        case.rollouts.push()
    assert case.log[-1].startswith("resync.distrust the engine's log-probs are not")
    assert Continuation([7], [-0.5]) == case.rollouts.canary.actor_continuation(case.rollouts.actor)


def test_a_failed_proof_is_followed_by_one_whole_push():
    case = make(sleeps=False, resync={"push": [ProofError("norm.weight differs")]})
    case.rollouts.push()
    pushes = [entry for entry in case.log if entry.startswith("resync.push")]
    assert pushes == ["resync.push False prove=False", "resync.push whole=True prove=True"]
    assert case.said == ["norm.weight differs; both models are pushed again, whole"]


def test_a_second_failed_proof_is_an_error():
    case = make(resync={"push": [ProofError("a differs"), ProofError("b differs")]})
    with pytest.raises(ProofError, match="b differs"):
        case.rollouts.push()
    assert "fleet.wake kv_cache" not in case.log


def test_a_restart_brings_the_actor_back_to_be_pushed():
    case = make(resync={"push": [EngineLostError("signal 9")]})
    case.rollouts.push()
    start = case.log.index("fleet.restart")
    assert case.log[start - 1 : start + 3] == ["actor.offload", "fleet.restart", "fleet.sleep", "resync.connect"]
    assert case.log[-6:] == [
        "actor.onload weights",
        "actor.offload optimizer",
        "fleet.wake weights",
        "resync.push True prove=True",
        "actor.offload weights",
        "fleet.wake kv_cache",
    ]


def test_what_engines_logged_is_lost_with_one_of_them_but_not_the_run():
    case = make(fleet={"take_decode_log": [["log"], EngineLostError("signal 9"), ["log of the next phase"]]})
    assert [case.rollouts.take_decode_log() for _ in range(3)] == [["log"], [], ["log of the next phase"]]
    assert "fleet.restart" not in case.log, "the next push does that"
