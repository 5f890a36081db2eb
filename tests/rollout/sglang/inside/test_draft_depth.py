"""inside/draft_depth.py and catch_up.py with stand-ins for sglang's objects, and the arguments for sglang."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from respec_trainer.config import SpeculationConfig
from respec_trainer.errors import ConfigError, EngineError
from respec_trainer.rollout.decode_log import STEPS_MESSAGE, DecodeLog, DepthSettings
from respec_trainer.rollout.sglang.arguments import server_arguments, step_environment
from respec_trainer.rollout.sglang.inside.catch_up import Backlog, missed
from respec_trainer.rollout.sglang.inside.draft_depth import DraftDepth
from respec_trainer.rollout.sglang.inside.plugin import outside
from respec_trainer.rollout.sglang.settings import EngineSettings
from tests.support.depth_choosers import chosen_by

FIXED = DepthSettings("fixed", (1, 3), max_batch=8, max_context=256, fixed=3)
OFF = DepthSettings("fixed", (0, 3), max_batch=8, max_context=256, fixed=0)
BROKEN = replace(OFF, **chosen_by("Broken", [0]))


def requests(count: int):
    return [Response(i) for i in range(count)]


class Response:
    """sglang's request, as far as it is used here. It ends at `last` tokens."""

    def __init__(self, name: int, last: int = 99):
        self.name, self.last = name, last
        self.origin_input_ids, self.output_ids = [0] * 4, [0]
        self.finished_len, self.is_retracted = None, False

    def finished(self) -> bool:
        return self.finished_len is not None

    def extend(self, tokens: int) -> None:
        if not self.finished():
            self.output_ids += [0] * tokens
            self.finished_len = self.last if len(self.output_ids) >= self.last else None


def fill(backlog: Backlog, steps: list) -> None:
    """Add one step for each list of requests. A token encodes its request and its step, and so do its features."""
    for turn, running in enumerate(steps):
        tokens = torch.tensor([10 * request.name + turn for request in running])
        backlog.add(running, tokens, tokens[:, None].float().expand(-1, 6).clone())


def test_a_backlog_is_read_sequence_by_sequence_in_order():
    a, b, c = requests(3)
    backlog = Backlog(2**20)
    fill(backlog, [[a, b], [a, b], [b, c], [c, b]])
    assert [missed(r) for r in (a, b, c)] == [2, 4, 2]
    part = backlog.pop([c, b], 100)  # a has finished
    assert part.counts == [2, 4] and part.tokens.tolist() == [22, 23, 10, 11, 12, 13]
    assert torch.equal(part.features[:, 0], part.tokens.float())
    assert [missed(r) for r in (b, c)] == [0, 0] and backlog.bytes == 0 and not backlog.chunks


def test_a_backlog_is_read_in_slices_oldest_first():
    a, b = requests(2)
    backlog = Backlog(2**20)
    fill(backlog, [[a], [a, b], [a, b]])
    assert backlog.pop([a, b], 3).counts == [2, 1]
    assert (missed(a), missed(b)) == (1, 1)
    assert backlog.pop([a, b], 1).tokens.tolist() == [2, 12], "at least one step"


def test_only_tokens_that_are_read_count():
    """Passes should be full, because a pass over few tokens reads the drafter's weights like one over many."""
    a, b, c = requests(3)
    backlog = Backlog(2**20)
    fill(backlog, [[a, c], [a, b, c], [a, b, c], [a, b]])
    assert backlog.pop([b], 2).tokens.tolist() == [11, 12], "a and c have finished"
    (left,) = backlog.chunks
    assert left.requests == [a, b] and backlog.bytes == left.features.nbytes


def test_a_request_whose_prompt_is_read_again_has_missed_nothing():
    a, b = requests(2)
    backlog = Backlog(2**20)
    fill(backlog, [[a, b], [a, b]])
    backlog.remove([a])
    assert missed(a) == 0
    fill(backlog, [[b, a]])
    part = backlog.pop([a, b], 100)
    assert part.counts == [1, 3] and part.tokens.tolist() == [0, 10, 11, 10]


def test_a_backlog_is_full_of_what_running_requests_need():
    a, b, c, d = requests(4)
    row = 6 * 4  # bytes of features
    backlog = Backlog(20 * row)
    fill(backlog, [[a, b, c, d]] * 5)
    assert not backlog.full([a, b, c, d])
    fill(backlog, [[a, b, c, d]])
    assert backlog.full([a, b, c, d])
    assert not backlog.full([a]), "three have finished, and their tokens are discarded"
    assert backlog.bytes == 6 * row
    assert backlog.pop([a], 100).tokens.tolist() == [0, 1, 2, 3, 4, 0]


class Mode:
    def __init__(self, extend: bool):
        self.is_extend = lambda: extend
        self.is_idle = lambda: False


def batch_of(reqs, extend: bool = False):
    return SimpleNamespace(
        reqs=reqs, forward_mode=Mode(extend), is_extend_in_batch=False, seq_lens_sum=None, extend_num_tokens=7
    )


def depth_of(settings: DepthSettings) -> tuple[DraftDepth, SimpleNamespace]:
    reads = []
    drafter = SimpleNamespace(_draft_extend_for_decode=lambda batch, result: reads.append(len(batch.reqs)))
    worker = SimpleNamespace(adaptive_controller=SimpleNamespace(params=None), draft_worker=drafter, reads=reads)
    depth = DraftDepth(settings, "cpu")
    depth.install(None, worker)
    return depth, worker


def decode(depth: DraftDepth, worker, reqs, kept: int = 0) -> int:
    """Run one decode batch; return its steps."""
    batch = batch_of(reqs)
    steps = depth.forward(lambda *_: depth.get_steps_for_batch(len(reqs)), worker, batch)
    if steps == 0:
        output = SimpleNamespace(hidden_states=torch.zeros(len(reqs), 6))
        result = SimpleNamespace(logits_output=output, next_token_ids=torch.zeros(len(reqs)), can_run_cuda_graph=False)
        depth.skip_extend(None, worker, batch, result)
    finish(depth, reqs, [kept] * len(reqs))
    return steps


def finish(depth: DraftDepth, reqs, kept: list[int]) -> None:
    """Process a batch's results as sglang does: report what was verified, then cut the responses."""

    def process(_processor, _batch, _result) -> None:
        depth.on_verify_complete(kept, len(kept))
        for request, drafts in zip(reqs, kept, strict=True):
            if not request.is_retracted:
                request.extend(1 + drafts)

    depth.settle(process, None, SimpleNamespace(reqs=reqs), None)


def test_it_is_installed_in_sglangs_controller_or_raises():
    depth, worker = depth_of(FIXED)
    assert worker.adaptive_controller.params is depth
    assert depth.candidate_steps == [0, 1, 3], "a chooser that fails needs the state without speculation"
    depth.set_cuda_graph_bs([1, 2])
    assert depth.cuda_graph_bs_for_step(3) == [1, 2]
    assert ask(depth, None).graph_sizes == (1, 2) and ask(depth_of(FIXED)[0], None).graph_sizes == ()
    with pytest.raises(EngineError, match="turned adaptive speculation off"):
        DraftDepth(FIXED, "cpu").install(None, SimpleNamespace(adaptive_controller=None))


def test_batches_are_logged():
    depth, worker = depth_of(FIXED)
    reqs = requests(3)
    depth.forward(lambda *_: None, worker, batch_of(reqs, extend=True))
    assert decode(depth, worker, reqs, kept=2) == 3
    log = depth.recorder.take()
    assert log.prefill.tolist() == [True, False] and log.tokens.tolist() == [7, 9]
    assert log.context.tolist() == [5.0, 5.0] and log.survivors.tolist() == [[0, 0, 0], [3, 3, 0]]


def test_what_lies_behind_an_end_is_not_gained():
    """Three passes gain four tokens each: one response keeps one, one all, and one is over or was retracted."""
    settings = replace(FIXED, **chosen_by("Attentive", [3]))
    depth, worker = depth_of(settings)
    reqs = [Response(0, last=2), Response(1, last=5), Response(2)]
    reqs[2].is_retracted = True
    decode(depth, worker, reqs, kept=3)
    decode(depth, worker, reqs, kept=2)  # as with overlapped scheduling: computed again although two are over
    log = depth.recorder.take()
    assert log.tokens.tolist() == [1 + 4, 0] and log.survivors.tolist() == [[3, 3, 3], [3, 3, 0]]
    seen = json.loads(depth.chooser.state())["seen"]
    assert seen == [[3, 2, [2, 2, 2], [5, 2, 1]], [3, 0, [0, 0, 0], [0, 0, 3]]]


@pytest.mark.parametrize("sizes", [[4, 1, 2], None])
def test_the_policy_is_told_the_graphs_sizes(sizes):
    """Also one that is made later, by new settings."""
    settings = replace(OFF, **chosen_by("Attentive", [0]))
    depth, _ = depth_of(settings)
    for _ in range(2):
        depth.set_cuda_graph_bs(sizes)
        assert json.loads(depth.chooser.state())["graphs"] == sorted(sizes or [])
        depth.apply(settings)
        assert json.loads(depth.chooser.state())["graphs"] == sorted(sizes or [])


def test_a_step_without_verification_leaves_the_log_alone():
    depth, _ = depth_of(FIXED)
    depth.settle(lambda *_: None, None, SimpleNamespace(reqs=requests(2)), None)
    assert depth.chooser.failures == 0 and len(depth.recorder.take()) == 0


@pytest.mark.parametrize(("settings", "reads"), [(OFF, 0), (replace(OFF, off="warm"), 2)])
def test_without_speculation_tokens_are_kept_or_read(settings, reads):
    depth, worker = depth_of(settings)
    reqs = requests(2)
    for _ in range(2):
        assert decode(depth, worker, reqs) == 0
    assert len(worker.reads) == reads and [missed(r) for r in reqs] == [2 - reads] * 2
    depth.forward(lambda *_: None, worker, batch_of(reqs, extend=True))
    assert [missed(r) for r in reqs] == [0, 0]
    decode(depth, worker, requests(1))
    assert len(depth.backlog.chunks) == (1 if settings is OFF else 0), "nothing is kept of finished requests"


def test_after_a_failure_nothing_is_kept():
    depth, worker = depth_of(BROKEN)
    reqs = requests(2)
    for _ in range(7):
        assert decode(depth, worker, reqs) == 0
    assert depth.chooser.failures == 1 and missed(reqs[0]) == 4


def test_results_of_another_batch_size_count_as_a_failure():
    depth, worker = depth_of(FIXED)
    decode(depth, worker, requests(2))
    finish(depth, requests(3), [0, 0, 0])
    assert depth.chooser.failures == 1 and decode(depth, worker, requests(2)) == 0


def ask(depth: DraftDepth, settings: DepthSettings | None, idle: bool = True):
    return DecodeLog.of_bytes(depth.serve(idle, settings and settings.to_json())["log"])


def test_settings_change_between_rollouts_only():
    depth, worker = depth_of(FIXED)
    decode(depth, worker, requests(2))
    with pytest.raises(EngineError, match="while requests run"):
        ask(depth, replace(FIXED, fixed=1), idle=False)
    assert len(ask(depth, replace(FIXED, fixed=1))) == 1
    assert decode(depth, worker, requests(2)) == 1
    with pytest.raises(EngineError, match=r"started with the candidate steps \[0, 1, 3\]"):
        ask(depth, replace(FIXED, candidates=(1, 2, 3)))
    assert len(ask(depth, None)) == 1 and len(ask(depth, None)) == 0
    with pytest.raises(EngineError, match="no EAGLE worker"):
        ask(DraftDepth(FIXED, "cpu"), None)


@pytest.mark.parametrize(("idle", "busy"), [(False, [{"busy": True}]), (True, [{"busy": False}])])
def test_an_answer_reports_whether_the_engine_was_busy(monkeypatch, idle, busy):
    """Asking again helps only if requests were running, not if there is no depth policy."""
    # sglang's module of messages takes seconds to import.
    messages = SimpleNamespace(DumperControlReqOutput=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", messages)
    depth, _ = depth_of(FIXED)
    sent = []
    channel = SimpleNamespace(send_output=lambda output, request: sent.append(output))
    scheduler = SimpleNamespace(is_fully_idle=lambda: idle, ipc_channels=SimpleNamespace(send_to_tokenizer=channel))
    depth.answer(None, scheduler, SimpleNamespace(method=STEPS_MESSAGE, body={"state": "{}"}))
    assert (sent[0].success, sent[0].response) == (False, busy)


def test_a_policy_s_state_is_in_the_log_and_is_restored():
    settings = replace(OFF, **chosen_by("Remembering", [3, 0, 0]))
    depth, worker = depth_of(settings)
    assert [decode(depth, worker, requests(2)) for _ in range(2)] == [3, 0]
    state = ask(depth, None).state
    other, worker = depth_of(settings)
    with pytest.raises(EngineError, match="while requests run"):
        other.serve(False, state=state)
    assert DecodeLog.of_bytes(other.serve(True, state=state)["log"]).state == state
    assert [decode(other, worker, requests(2)) for _ in range(2)] == [0, 3]


def test_hooks_on_one_target_are_nested():
    calls = []

    def outer(original, x):
        calls.append("outer")
        return original(x) + 1

    def inner(original, x):
        calls.append("inner")
        return original(2 * x)

    both = outside({"t": (outer, "AROUND"), "o": (outer, "AROUND")}, {"t": (inner, "AROUND"), "i": (inner, "AROUND")})
    assert both["t"][0](lambda x: x + 100, 5) == 111 and calls == ["outer", "inner"]
    assert set(both) == {"t", "o", "i"} and both["t"][1] == "AROUND"


def engine_settings(**changes) -> EngineSettings:
    return EngineSettings("actor", "drafter", **{"speculation": SpeculationConfig(), "steps": FIXED} | changes)


def test_sglang_prepares_every_candidate_and_none():
    arguments = server_arguments(engine_settings())
    table = json.loads(Path(arguments["speculative_adaptive_config"]).read_text())
    assert table == {"1": {"candidate_steps": [0, 1, 3]}} and arguments["speculative_adaptive"] is True
    assert (arguments["speculative_num_steps"], arguments["speculative_num_draft_tokens"]) == (3, 4)
    assert step_environment(None) == {}
    assert step_environment(FIXED) == {"SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND": "1"}
    assert "SGLANG_SIMULATE_ACC_LEN" in step_environment(replace(FIXED, simulated_accept_length=2.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculation": SpeculationConfig(algorithm="none")}, "chains of eagle3 only"),
        ({"speculation": SpeculationConfig(topk=2, draft_tokens=6)}, "chains of eagle3 only"),
        ({"speculation": SpeculationConfig(rejection_sampling=True)}, "rejection_sampling=false"),
        ({"steps_by_batch": {1: 3}}, "not both"),
    ],
)
def test_an_engine_whose_steps_cannot_change_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        server_arguments(engine_settings(**changes))
