"""rollout/fleet/feeder.py and pending.py: each waiting unit is drawn once, even if engines die."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from respec_trainer.errors import EngineError
from respec_trainer.rollout.fleet.deal import Unit
from respec_trainer.rollout.fleet.feeder import Feeder, Queue
from respec_trainer.rollout.fleet.pending import FleetPending
from respec_trainer.rollout.sample import Request, Sample, SamplingParams

REQUESTS = [Request(str(i), (i,), SamplingParams(max_new_tokens=4)) for i in range(40)]
UNITS = [Unit((i, i + 1), 2.0) for i in range(0, 40, 2)]


class Engine:
    """An engine with `slots`, whose responses take `seconds`. It dies at the request after the first `life` ones.

    With a `gate` its responses wait until that is set.
    """

    def __init__(self, seconds, slots=4, life=10**6, gate=None):
        self.seconds, self.slots, self.life, self.gate = seconds, threading.Semaphore(slots), life, gate
        self.failure, self.given = None, []

    def submit(self, requests):
        if len(self.given) + len(requests) > self.life:
            self.failure = EngineError("died")
        if self.failure is not None:
            raise self.failure
        self.given += [request.key for request in requests]
        return Work(self, requests)


class Work:
    def __init__(self, engine, requests):
        self.engine, self.requests = engine, requests
        threads = ThreadPoolExecutor(len(requests))
        self.futures = [threads.submit(self.draw, request) for request in requests]

    def draw(self, request):
        with self.engine.slots:
            time.sleep(self.engine.seconds)
            assert self.engine.gate is None or self.engine.gate.wait(60)
        return Sample(request.key, list(request.prompt_ids), [7], [-1.0], "stop", "actor-1", "none")

    def done(self):
        return sum(future.done() for future in self.futures)

    def collect(self):
        samples = [future.result() for future in self.futures]
        if self.engine.failure is not None:
            raise self.engine.failure
        return samples

    def delivered(self):
        return [future.result() for future in self.futures]


@pytest.fixture
def store():
    return dist.HashStore()


def start(engine, mine, queue, resume=True):
    fleet = SimpleNamespace(engine=engine, resume=resume, room=5, restore_chooser=lambda: None, counts=Counter())
    return FleetPending(fleet, REQUESTS, mine, queue)


def collect(*phases):
    """Collect several phases at the same time, as ranks do; return each engine's samples with their positions."""
    with ThreadPoolExecutor() as threads:
        return [future.result() for future in [threads.submit(phase.collect_own) for phase in phases]]


def wait_until(condition) -> None:
    while not condition():
        time.sleep(0.001)


def test_a_queue_gives_each_unit_once(store):
    queues = [Queue(UNITS, store, "phase") for _ in range(3)]
    with ThreadPoolExecutor() as threads:
        taken = [list(found) for found in threads.map(lambda queue: list(iter(queue.take, None)), queues)]
    assert sorted((u for part in taken for u in part), key=lambda u: u.positions) == UNITS
    assert all(queue.empty() for queue in queues)
    assert Queue(UNITS, store, "another phase").take() == UNITS[0]


def test_the_faster_engine_draws_what_the_slower_has_not_begun(store):
    gate, queue = threading.Event(), Queue(UNITS[4:], store, "phase")
    slow, fast = Engine(0.0, gate=gate), Engine(0.001)
    phases = [start(engine, UNITS[i : i + 2], Queue(UNITS[4:], store, "phase")) for engine, i in ((slow, 0), (fast, 2))]
    assert all(phase.generating() for phase in phases)
    threading.Thread(target=lambda: wait_until(queue.empty) or gate.set(), daemon=True).start()
    drawn = collect(*phases)
    assert not any(phase.generating() for phase in phases)
    assert sorted(position for share in drawn for position, _ in share) == list(range(40))
    assert all(sample.key == str(position) for share in drawn for position, sample in share)
    assert len(slow.given) == 6 and len(fast.given) == 34, "the slow one took what it had room for, and no more"


@pytest.mark.parametrize("resume", [True, False])
def test_a_dead_engine_keeps_the_units_that_it_took(store, resume):
    """It took more than it could submit. After its restart it draws these units, and those that no engine has taken."""
    engine = Engine(0.01, life=10)
    phase = start(engine, UNITS[:2], Queue(UNITS[4:], store, "phase"), resume)
    with pytest.raises(EngineError, match="died"):
        phase.collect_own()
    owed = list(phase.positions)
    assert owed == [0, 1, 2, 3, *range(8, 16)][: len(owed)] and len(owed) == 12, "the last two were refused"
    before, engine.life, engine.failure = list(engine.given), 10**6, None
    drawn = phase.collect_own()
    assert [position for position, _ in drawn] == [0, 1, 2, 3, *range(8, 40)]
    again = [] if resume else before
    assert engine.given[len(before) :][: len(again) + 2] == [*again, "14", "15"]
    assert phase.fleet.counts["lost_tokens"] == (0 if resume else 10)


def test_a_dead_engine_leaves_the_queue_to_the_others(store):
    dying, healthy = Engine(0.01, life=6), Engine(0.02)
    phases = [
        start(engine, UNITS[i : i + 2], Queue(UNITS[4:], store, "phase")) for engine, i in ((dying, 0), (healthy, 2))
    ]
    with ThreadPoolExecutor() as threads:
        first, second = [threads.submit(phase.collect_own) for phase in phases]
        with pytest.raises(EngineError):
            first.result()
        others = second.result()
    dying.life, dying.failure = 10**6, None
    mine, same = phases[0].collect_own(), phases[1].collect_own()
    assert [position for position, _ in same] == [position for position, _ in others], "nothing is drawn again"
    assert sorted(position for position, _ in [*mine, *same]) == list(range(40))


def test_an_engine_with_no_share_draws_from_the_queue(store):
    phase = start(Engine(0.0), [], Queue(UNITS[18:], store, "phase"))
    assert [position for position, _ in phase.collect_own()] == [36, 37, 38, 39]


def test_a_store_that_is_gone_ends_the_phase():
    def gone(name, more):
        raise RuntimeError("Connection reset")

    phase = start(Engine(0.0), UNITS[:1], Queue(UNITS[1:], SimpleNamespace(add=gone), "phase"))
    with pytest.raises(EngineError, match="store .* Connection reset"):
        phase.collect_own()


def test_a_feeder_that_is_stopped_takes_no_more(store):
    queue = Queue(UNITS, store, "phase")
    handed = []
    feeder = Feeder(queue, room=lambda: not handed, hand=handed.append)
    while not handed:
        time.sleep(random.random() / 1000)
    assert feeder.feeding()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "feeder"]
    assert thread.daemon, "a rank that fails ends without waiting for its engine"
    feeder.stop()
    assert not feeder.feeding() and handed == UNITS[:1] and not queue.empty()


def test_every_sample_of_every_engine_comes_in_the_order_of_the_requests_and_is_observed(store):
    phase = start(Engine(0.0), UNITS[10:], None)
    others = [(i, Sample(str(i), [i], [7], [-1.0], "stop", "actor-1", "none")) for i in reversed(range(20))]
    observed = []
    phase.fleet.agree = lambda action: [others, action()]
    phase.fleet.dealer = SimpleNamespace(observe=observed.append)
    samples = phase.collect()
    assert [sample.key for sample in samples] == [str(i) for i in range(40)] and observed == [samples]


def test_a_rank_without_an_engine_collects_what_the_others_drew(store):
    phase = start(None, [], None)
    drawn = [Sample(str(i), [i], [7], [-1.0], "stop", "actor-1", "none") for i in range(40)]
    asked = []
    phase.fleet.agree = lambda action: asked.append(action) or [list(enumerate(drawn))]
    phase.fleet.dealer = SimpleNamespace(observe=lambda samples: None)
    assert phase.collect() == drawn and asked == [None]


def full(engine, mine, queue):
    """Start a phase whose engine never has room for units of the queue."""
    fleet = SimpleNamespace(engine=engine, resume=True, room=0, restore_chooser=lambda: None, counts=Counter())
    return FleetPending(fleet, REQUESTS, mine, queue)


def test_an_engine_that_may_get_more_still_generates_though_it_has_done_all_it_has(store):
    phase = full(Engine(0.0), UNITS[:1], Queue(UNITS[1:], store, "phase"))
    phase.parts[0].collect()
    assert phase.done() == phase.submitted == 2 and phase.generating()
    phase.feeder.stop()
    assert not phase.generating()


def test_after_an_engine_s_death_nothing_more_is_taken_for_it(store):
    engine, queue = Engine(0.0), Queue(UNITS[1:], store, "phase")
    phase = full(engine, UNITS[:1], queue)
    feeder, engine.failure = phase.feeder, EngineError("died")
    with pytest.raises(EngineError, match="died"):
        phase.collect_own()
    assert not feeder.feeding() and queue.take() == UNITS[1]


@pytest.mark.parametrize(("mine", "queued", "restored"), [(1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 0, 0)])
def test_the_depth_chooser_is_restored_before_anything_is_drawn(store, mine, queued, restored):
    calls = []
    fleet = SimpleNamespace(engine=Engine(0.0), resume=True, room=5, counts=Counter())
    fleet.restore_chooser = lambda: calls.append(list(fleet.engine.given))
    FleetPending(fleet, REQUESTS, UNITS[:mine], Queue(UNITS[1:], store, "phase") if queued else None)
    assert calls == [[]] * restored


def test_tokens_that_were_kept_are_counted_at_each_death():
    """The engine delivers one token of a response and dies, twice; then it finishes the response."""
    lives = iter([("lost", [5]), ("lost", [6]), ("stop", [7])])

    class Dying:
        failure = None

        def submit(self, requests):
            reason, tokens = next(lives)
            self.failure = EngineError("died") if reason == "lost" else None
            (request,) = requests
            sample = Sample("0", list(request.prompt_ids), tokens, [-1.0], reason, "actor-1", "none")
            return SimpleNamespace(delivered=lambda: [sample], collect=lambda: self.collected(sample))

        def collected(self, sample):
            if self.failure is not None:
                raise self.failure
            return [sample]

    phase = start(Dying(), [Unit((0,), 1.0)], None)
    for resumed in (1, 1 + 2):
        with pytest.raises(EngineError):
            phase.collect_own()
        assert phase.fleet.counts == {"lost_tokens": 0, "resumed_tokens": resumed}
    ((_, sample),) = phase.collect_own()
    assert (sample.response_ids, sample.restarts) == ([5, 6, 7], 2)


def test_a_host_that_is_gone_generates_nothing(store):
    def gone():
        raise EngineError("no contact")

    phase = start(SimpleNamespace(submit=lambda requests: SimpleNamespace(done=gone)), UNITS[:1], None)
    assert not phase.generating()
