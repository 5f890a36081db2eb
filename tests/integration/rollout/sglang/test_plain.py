"""SGLangEngine without speculation, in fp32, against transformers; and its weight updates."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from respec_trainer.config import EngineConfig
from respec_trainer.convert.command import main as convert
from respec_trainer.errors import EngineError
from respec_trainer.network import free_port
from respec_trainer.rollout.engine import TensorSpec
from respec_trainer.rollout.sample import UNDRAFTED, Request, SamplingParams
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from respec_trainer.rollout.sglang.workers import prepare_process
from tests.support.rollout_models import TRUNCATED, Reference, check_truncated, save_target

PROMPTS = ((5, 6, 7), (9,), (3, 100, 130, 17, 22, 64, 64, 65))
# The launcher's variables of a rank. An engine that joined as a rank of the run would wait for ever.
LAUNCHER = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def state() -> tuple:
    """Return the global state that starting an engine must not change."""
    root = logging.getLogger()
    policy, method = asyncio.get_event_loop_policy(), multiprocessing.get_start_method(allow_none=True)
    return dict(os.environ), root.level, list(root.handlers), policy, method, sys.modules["__main__"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A model folder converted from a checkpoint, like a trained actor; the reference reads the same folder."""
    folder = tmp_path_factory.mktemp("plain")
    source, checkpoint, out = (str(folder / name) for name in ("source", "checkpoint", "target"))
    save_target(Path(source), "qwen3")
    assert convert(["to-megatron", "--hf", source, "--out", checkpoint, "--tp", "2"]) == 0
    assert convert(["to-hf", "--checkpoint", checkpoint, "--out", out, "--shard-gb", "1e-4"]) == 0
    return Path(out)


@pytest.fixture(scope="module")
def reference(target):
    return Reference(target)


@pytest.fixture(scope="module")
def engine(target):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LAUNCHER.items():
            patch.setenv(name, value)
        engine = SGLangEngine(
            EngineSettings(str(target), dtype="fp32", seeded=True, engine=EngineConfig(max_total_tokens=8192))
        )
        prepare_process("cpu")
        before = state()
        engine.start()
        assert state() == before
    yield engine
    engine.shutdown()


def ask(engine, *params: SamplingParams, prompt=PROMPTS[0]):
    return engine.submit([Request(str(i), prompt, p) for i, p in enumerate(params)]).collect()


def greedy(tokens: int, **changes) -> SamplingParams:
    return SamplingParams(tokens, temperature=0.0, **({"ignore_eos": True} | changes))


def test_greedy_tokens_equal_transformers(engine, reference):
    pending = engine.submit([Request(f"key-{i}", prompt, greedy(24)) for i, prompt in enumerate(PROMPTS)])
    samples = pending.collect()
    assert pending.done() == 3 and pending.collect() is samples
    for i, (prompt, sample) in enumerate(zip(PROMPTS, samples, strict=True)):
        assert sample.response_ids == reference.greedy(prompt, 24)
        assert (sample.key, sample.prompt_ids, sample.finish_reason) == (f"key-{i}", list(prompt), "length")
        assert (sample.verify_count, sample.accept_histogram, sample.accept_length) == (0, [], 1.0)
        assert sample.origins == [UNDRAFTED] * 24


def test_more_requests_than_run_at_once(engine, reference):
    expected = reference.greedy(PROMPTS[0], 8)
    samples = ask(engine, *[greedy(1 + i % 8) for i in range(150)])
    assert [s.response_ids for s in samples] == [expected[: 1 + i % 8] for i in range(150)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_at_the_temperature(engine, reference, temperature):
    for sample in ask(engine, *[SamplingParams(16, temperature=temperature, ignore_eos=True)] * 4):
        expected = reference.logprobs(PROMPTS[0], sample.response_ids, temperature)
        torch.testing.assert_close(torch.tensor(sample.sampler_logprobs), expected, atol=2e-5, rtol=0)  # fp32 sums


def test_log_probs_are_of_what_top_k_and_top_p_keep(engine, reference):
    asked = [*TRUNCATED, TRUNCATED[2]] * 4
    check_truncated(reference, ask(engine, *asked), asked)


def test_every_request_has_its_own_parameters(engine, reference):
    expected = reference.greedy(PROMPTS[0], 12)
    stop = expected[4]
    samples = ask(
        engine,
        greedy(12),
        SamplingParams(12, temperature=1.0, ignore_eos=True),
        greedy(12, stop_token_ids=(stop,), ignore_eos=False),
        SamplingParams(12, temperature=5.0, top_k=1, ignore_eos=True),
        SamplingParams(12, temperature=5.0, top_p=1e-6, ignore_eos=True),
        greedy(3),
    )
    assert samples[0].response_ids == samples[3].response_ids == samples[4].response_ids == expected
    assert samples[1].response_ids != expected
    assert samples[2].response_ids == expected[: expected.index(stop) + 1] and samples[2].finish_reason == "stop"
    assert samples[5].response_ids == expected[:3] and samples[5].finish_reason == "length"


def test_the_end_of_sequence_ends_a_response(engine):
    samples = ask(engine, *[SamplingParams(100, temperature=3.0)] * 32)
    stopped = [s for s in samples if s.finish_reason == "stop"]
    assert stopped and all(s.response_ids[-1] == 2 and 2 not in s.response_ids[:-1] for s in stopped)


def test_seeds_fix_the_draws_whatever_else_runs(engine):
    seeded = [SamplingParams(12, temperature=1.0, ignore_eos=True, seed=seed) for seed in (7, 8, 7)]
    free = SamplingParams(12, temperature=1.0, ignore_eos=True)
    first, other, again = (s.response_ids for s in ask(engine, *seeded))
    assert first == again != other
    crowd = [s.response_ids for s in ask(engine, free, seeded[0], free, free)]
    assert crowd[1] == first and len({tuple(ids) for ids in crowd}) == 4


def test_plain_sampling_follows_the_target(engine, reference):
    samples = ask(engine, *[SamplingParams(3, temperature=0.8, ignore_eos=True)] * 1500)
    assert reference.p_value(PROMPTS[0], [s.response_ids for s in samples], 3, 0.8) > 1e-3


def test_no_requests_give_no_samples(engine):
    assert engine.submit([]).collect() == []


def test_a_group_reads_its_prompt_once_until_the_weights_change(engine, reference):
    """Requests that start after the first of their group find its prompt in the cache, except the last token."""
    group, slots = 50, engine.settings.engine.max_running_requests
    prompts = [tuple(range(10, 50)), tuple(range(60, 100))]
    requests = [Request("k", prompt, greedy(6)) for prompt in prompts for _ in range(group)]
    expected = [response for prompt in prompts for response in [reference.greedy(prompt, 6)] * group]

    def cached() -> int:
        pending = engine.submit(requests)
        assert [sample.response_ids for sample in pending.collect()] == expected
        return sum(output["meta_info"]["cached_tokens"] for output in pending.future.result())

    assert (2 * group - slots) * 39 <= cached() < 2 * group * 39
    assert cached() == 2 * group * 39
    push(engine, reference.model.state_dict(), "initial")
    assert cached() < 2 * group * 39


def test_impossible_requests_are_refused(engine):
    with pytest.raises(EngineError, match="tokenizer=True"):
        ask(engine, SamplingParams(4, stop=("\n",)))
    with pytest.raises(EngineError, match="refused a request.*(context|maximum|longer)"):
        ask(engine, greedy(4), prompt=tuple([5] * 300))
    with pytest.raises(EngineError, match="already"):
        engine.start()
    with pytest.raises(EngineError, match="can hold only one"):
        SGLangEngine(engine.settings).start()
    assert ask(engine, greedy(2))[0].finish_reason == "length"  # the engine still runs


def changed(reference: Reference) -> dict[str, torch.Tensor]:
    """Return changed copies of the target's weights."""
    generator = torch.Generator().manual_seed(3)
    state = {name: weight.clone() for name, weight in reference.model.state_dict().items()}
    for name, weight in state.items():
        if "proj" in name:
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return state


def test_weights_by_tensor_and_back_by_broadcast(engine, reference, target):
    """Update the weights, check the new model's answers, and restore the old weights over gloo."""
    old, new = reference.model.state_dict(), changed(reference)
    push(engine, old, "initial")  # empties the prefix cache, as before `restored`, so that shapes are equal
    before = ask(engine, greedy(24))[0]
    names = list(new)
    engine.begin_weight_update("target")
    engine.receive_tensors([(name, new[name]) for name in names[:20]], "target").result(60)
    engine.receive_tensors([(name, new[name]) for name in names[20:]], "target").result(60)
    engine.end_weight_update("target", "actor-1")
    after = ask(engine, greedy(24))[0]
    other = Reference(target)
    other.model.load_state_dict(new)
    assert after.response_ids == other.greedy(PROMPTS[0], 24) != before.response_ids
    assert (before.actor_version, after.actor_version) == ("initial", "actor-1")
    assert after.drafter_version == "initial"
    broadcast(engine, old, "target", "actor-2")
    restored = ask(engine, greedy(24))[0]
    assert restored.response_ids == before.response_ids and restored.actor_version == "actor-2"
    torch.testing.assert_close(restored.sampler_logprobs, before.sampler_logprobs, atol=0, rtol=0)


def push(engine, weights: dict[str, torch.Tensor], version: str) -> None:
    """Update the target's weights, which also empties the engine's prefix cache."""
    engine.begin_weight_update("target")
    engine.receive_tensors(list(weights.items()), "target").result(60)
    engine.end_weight_update("target", version)


def broadcast(engine, tensors: dict[str, torch.Tensor], role: str, version: str) -> None:
    """Send tensors as rank 0 of a group of two, the engine being rank 1."""
    from sglang.srt.utils import init_custom_process_group

    port = free_port()
    joining = engine.join_group("test", "127.0.0.1", port, 2, 1, "gloo")
    group = init_custom_process_group(
        backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name="test"
    )
    joining.result(30)
    specs = [TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()]
    engine.begin_weight_update(role)
    receiving = engine.receive_broadcast(specs, role, "test")
    for tensor in tensors.values():
        dist.broadcast(tensor.contiguous(), src=0, group=group)
    receiving.result(30)
    engine.end_weight_update(role, version)
    engine.leave_group("test")
    dist.destroy_process_group(group)


def test_updates_that_would_go_wrong_are_refused(engine, reference):
    weight = ("model.norm.weight", reference.model.model.norm.weight.detach())
    with pytest.raises(EngineError, match="begin_weight_update"):
        engine.receive_tensors([weight], "target").result(60)
    with pytest.raises(EngineError, match="no draft model"):
        engine.begin_weight_update("draft")
    engine.leave_group("nobody")  # it is not a member: an engine that was restarted is in no group
    pending = engine.submit([Request("k", PROMPTS[0], greedy(200))])
    with pytest.raises(EngineError, match="1 submitted batches are still running"):
        engine.begin_weight_update("target")
    pending.collect()
    engine.begin_weight_update("target")
    try:
        with pytest.raises(EngineError, match="already"):
            engine.begin_weight_update("target")
        with pytest.raises(EngineError, match="during an update"):
            ask(engine, greedy(2))
        with pytest.raises(EngineError, match=r"no model\.nomr\.weight"):
            engine.receive_tensors([("model.nomr.weight", weight[1])], "target").result(60)
        with pytest.raises(EngineError, match="draft weights during an update of the target"):
            engine.receive_tensors([weight], "draft").result(60)
        with pytest.raises(EngineError, match=r"shape \(3,\), but the model's is \(64,\)"):
            engine.receive_tensors([(weight[0], torch.ones(3))], "target").result(60)
        with pytest.raises(EngineError, match="from group nobody"):
            engine.receive_broadcast([TensorSpec(weight[0], "float32", (64,))], "target", "nobody").result(30)
    finally:
        engine.receive_tensors([weight], "target").result(60)
        engine.end_weight_update("target", "actor-3")
    assert ask(engine, greedy(24))[0].response_ids == reference.greedy(PROMPTS[0], 24)
