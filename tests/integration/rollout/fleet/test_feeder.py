"""rollout/fleet/feeder.py with two running engines: responses move to the engine that has room and are the same there.

Decoding is greedy and in float32, so that a response depends neither on its engine nor on the rest of its batch.
"""

from __future__ import annotations

import time

from tests.support.configs import smallest_config
from tests.support.models import save_tiny_model, tiny_config
from tests.support.processes.ranks import run_ranks

SHORT, LONG = 4, 96
SLOTS = 2
VOCAB = 128


def ask(config):
    """Run two phases on one rank; return all samples, and the numbers of requests and tokens that its engine drew."""
    import torch.distributed as dist

    from respec_trainer.rollout.fleet.fleet import RolloutFleet
    from respec_trainer.rollout.sample import Request, SamplingParams
    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import EngineSettings

    class Engine(SGLangEngine):
        """An engine that records the keys of its requests."""

        def start(self):
            self.keys = []
            super().start()

        def submit(self, requests):
            self.keys += [request.key for request in requests]
            return super().submit(requests)

    def request(i):
        sampling = SamplingParams(LONG if i < 8 else SHORT, temperature=0.0, ignore_eos=True)
        return Request(str(i), (5 + i, 9, 33 + i), sampling)

    dist.init_process_group("gloo")
    fleet = RolloutFleet(config, lambda i: Engine(EngineSettings.from_config(config, "cpu", i)), None, "cpu")
    phases = []
    try:
        for hands_over in (True, False):
            fleet.hands_over = hands_over
            requests = [request(i) for i in range(16)]
            pending = begin_second_first(fleet, requests) if hands_over else fleet.start(requests)
            samples = pending.collect()
            drawn, fleet.engine.keys = fleet.engine.keys, []
            counts = len(drawn), sum(len(sample.response_ids) for sample in samples if sample.key in drawn)
            phases.append(([(s.key, s.response_ids) for s in samples], counts))
        return phases
    finally:
        fleet.shutdown()


def begin_second_first(fleet, requests):
    """Start the first engine after the second has taken units over, so that the machine's load does not matter."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        dist.barrier()
        return fleet.start(requests)
    pending = fleet.start(requests)
    begun = pending.submitted
    while pending.submitted == begun:
        assert pending.generating(), "the second engine drew its own share and took no more"
        time.sleep(0.01)
    dist.barrier()
    return pending


def test_responses_move_to_the_engine_with_room_and_are_then_dealt_by_length(tmp_path):
    target = save_tiny_model(tmp_path / "target", tiny_config("qwen3", vocab_size=VOCAB, layers=4))
    settings = [f"model.path={target}", "model.dtype=fp32", "rollout.engine.span=1"]
    settings += [f"rollout.engine.max_running_requests={SLOTS}", "rollout.engine.max_total_tokens=2048"]
    first, second = run_ranks(2, ask, smallest_config(tmp_path, *settings))
    (samples, (drawn, tokens)), (again, fitted) = first
    assert [key for key, _ in samples] == [str(i) for i in range(16)]
    assert samples == again == second[0][0] == second[1][0]
    others, their_tokens = second[0][1]
    assert drawn + others == 16 and tokens + their_tokens == 8 * (LONG + SHORT)
    # The lengths were unknown, so all long responses were dealt to the first engine; the second took some over.
    assert max(tokens, their_tokens) < 8 * LONG
    # In the second phase the lengths are known.
    assert fitted == second[1][1] == (8, 4 * (LONG + SHORT))
