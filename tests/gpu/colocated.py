"""One rank whose actor and engine share a GPU, in stages: each does a part of what a training step does with both.

The result of each stage is recorded, or its error. After an error the next stages still run, on the same engine.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

from tests.gpu.models import Pair, prompts
from tests.gpu.place import DEVICE, ON_GPU, claim, used_bytes

POOL = 131072 if ON_GPU else 8192  # tokens of the engine's KV cache
PUSHES = 5


def run(pair: Pair, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results of each stage by its name; {"error": traceback} for a stage that raised."""
    claim()
    found: dict[str, dict[str, Any]] = {}
    with live(settings(pair, folder)) as parts:
        for stage in (push_weights, continue_greedily, sleep_and_wake, survive, select_all):
            try:
                found[stage.__name__] = stage(parts, pair)
            except Exception:  # noqa: BLE001 - the test of this stage reports it
                found[stage.__name__] = {"error": traceback.format_exc()}
    return found


def settings(pair: Pair, folder: Path):
    from tests.support.configs import smallest_config

    return smallest_config(
        folder,
        f"run.device={DEVICE}",
        f"model.path={pair.target}",
        "model.dtype=bf16",
        f"drafter.path={pair.drafter}",
        "speculation.algorithm=eagle3",
        "actor.optim.lr=1.0e-4",
        f"rollout.engine.max_total_tokens={POOL}",
        "rollout.engine.max_running_requests=32",
        "rollout.engine.mem_fraction=0.4",
        "resync.bucket_mb=64",
        "resync.verify=checksum",
    )


@contextlib.contextmanager
def live(config):
    """Make actor, engine and resync of one rank, as a job does; they end with the block."""
    import torch.distributed as dist

    from respec_trainer.actor.engine import Actor
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.drafter.online.setup import setup_learner
    from respec_trainer.resync import Resync
    from respec_trainer.resync.ipc import IPCTransport
    from respec_trainer.resync.transport import setup_transport
    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import EngineSettings

    topology = init_parallel(config)
    control = dist.new_group(backend="gloo")
    actor = Actor(config, topology, total_updates=100)
    drafter = setup_learner(config, actor.hf_config)
    engine = SGLangEngine(EngineSettings.from_config(config, DEVICE))
    try:
        engine.start()
        # A rehearsal would choose gloo; it uses handles of host memory instead, so that it runs IPCTransport too.
        handles = IPCTransport(engine, [0], config.resync.timeout)
        transport = setup_transport(config, DEVICE, engine, [0], control) if ON_GPU else handles
        resync = Resync(config, actor, drafter, engine, transport, control)
        yield SimpleNamespace(actor=actor, engine=engine, resync=resync)
    finally:
        engine.shutdown()
        actor.engine.destroy()
        shutdown_parallel()


def push_weights(parts, pair: Pair) -> dict[str, Any]:
    """Update and push several times. `push` raises unless the digests of all tensors are those of what was sent."""
    speeds, pushes = [], []
    for number in range(PUSHES):
        step(parts.actor, pair)
        began = time.perf_counter()
        reports = parts.resync.push(prove=True)
        pushes.append(time.perf_counter() - began)
        if number:  # the first push opens new handles, and sends the drafter too
            speeds += [report.bytes / report.seconds / 1e9 for report in reports]
    return {
        "transport": type(parts.resync.transport).__name__,
        "gigabytes": reports[0].bytes / 1e9,
        "gb_per_second": median(speeds),
        "push_and_proof_seconds": median(pushes[1:]),
        "tensors": reports[0].tensors,
        "version": parts.engine.versions["target"],
    }


def continue_greedily(parts, pair: Pair) -> dict[str, Any]:
    """Compare the log-probs of the engine's greedy continuation with the actor's."""
    from respec_trainer.resync.canary import Canary

    canary = Canary(prompts(1, pair.size.vocab, seed=7)[0], 8, tolerance=0.25)
    (sample,) = parts.engine.submit([canary.request()]).collect()
    return {"canary_error": canary.check(sample, canary.actor_continuation(parts.actor))}


def sleep_and_wake(parts, pair: Pair) -> dict[str, Any]:
    """Put engine and actor to sleep and wake them, in the order of a training step.

    Return the bytes of the GPU that all processes use after each change, and the seconds it took.
    """
    import torch

    def now() -> int:
        if ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return used_bytes()

    taken = {"both": now()}
    began = time.perf_counter()
    parts.engine.sleep()
    slept = time.perf_counter() - began
    taken["engine_out"] = now()
    parts.actor.offload("optimizer")
    parts.actor.offload("weights")
    taken["both_out"] = now()
    parts.actor.onload()
    began = time.perf_counter()
    parts.engine.wake("weights")
    parts.resync.push(whole=True, prove=True)
    parts.engine.wake("kv_cache")
    woke = time.perf_counter() - began
    taken["both_again"] = now()
    model = parts.actor.engine.module
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cache = POOL * pair.size.layers * 2 * pair.size.hidden * 2  # keys and values of the target, bf16
    # Lower limits: weights in bf16; in float32 the master weights and two moments.
    wanted = {"engine": 2 * parameters + cache, "actor": 12 * parameters}
    return {"taken": taken, "at_least": wanted, "sleep_seconds": slept, "wake_and_push_seconds": woke}


def survive(parts, pair: Pair) -> dict[str, Any]:
    """Compare the drafter's accept length and digests before and after a sleep that ends with a whole push."""
    before, digests = accept_length(parts, pair), parts.engine.digests("draft")
    parts.engine.sleep()
    parts.engine.wake("weights")
    parts.resync.push(whole=True, prove=True)
    parts.engine.wake("kv_cache")
    return {
        "accept_length_before": before,
        "accept_length_after": accept_length(parts, pair),
        "same_digests": parts.engine.digests("draft") == digests,
    }


def select_all(parts, pair: Pair) -> dict[str, Any]:
    """Send the head with sglang's selector "all", which this package never uses; then push all weights again.

    The rows of the head are sent in reverse order, so that neither model has held them. If both models receive them,
    drafts may still be accepted; only the digests show the change.
    """
    from respec_trainer.rollout.sglang.weights import flat_bucket, serialize

    before, digests = accept_length(parts, pair), parts.engine.digests("draft")
    updater = parts.engine.weights
    head = ("lm_head.weight", parts.actor.engine.module.vocabulary_weights()[1].detach().flip(0).contiguous())
    updater.send("selecting all", "begin_weight_update", "BeginWeightUpdateReqInput", selector="all").result(60)
    content = flat_bucket([head])
    fields = {"serialized_named_tensors": serialize(content, 1), "load_format": "flattened_bucket"}
    name, message = "update_weights_from_tensor", "UpdateWeightsFromTensorReqInput"
    updater.send("sending to all", name, message, flush_cache=True, selector="all", **fields).result(60)
    updater.send("ending", "end_weight_update", "EndWeightUpdateReqInput").result(60)
    changed = [name for name, value in parts.engine.digests("draft").items() if digests[name] != value]
    damaged = accept_length(parts, pair)
    parts.resync.push(whole=True, prove=True)
    return {
        "drafter_tensors_overwritten": changed,
        "accept_length_before": before,
        "accept_length_after": damaged,
        "accept_length_repaired": accept_length(parts, pair),
    }


def step(actor, pair: Pair) -> None:
    """Make one optimizer step on made-up samples."""
    import torch

    from respec_trainer.rollout.batch import collate
    from respec_trainer.rollout.sample import Sample

    rows = prompts(4, pair.size.vocab, seed=actor.updates)
    samples = [Sample("k", list(row), [11 + i, 50, 60 + i], [-3.0] * 3, "stop", "a", "d") for i, row in enumerate(rows)]
    batch = collate(samples, pad_id=0)
    actor.update(batch, actor.infer(batch).logprobs, torch.tensor([1.0, -1.0, 2.0, -0.5]))


def accept_length(parts, pair: Pair) -> float:
    """Return the mean accept length of greedy responses. It depends on the two models only: nothing is drawn."""
    from respec_trainer.rollout.sample import Request, SamplingParams

    params = SamplingParams(48, temperature=0.0, ignore_eos=True)
    requests = [Request(str(i), row, params) for i, row in enumerate(prompts(16, pair.size.vocab, seed=9))]
    return mean(sample.accept_length for sample in parts.engine.submit(requests).collect())
