"""Measure a push against a raw broadcast of the same bytes over the same group, and the time of its verification.

    OMP_NUM_THREADS=1 deepspeed --num_gpus 1 benchmarks/resync.py --tp 1 --megabytes 600 --rounds 7 --out resync.json
    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 benchmarks/resync.py --tp 2 --megabytes 600 --rounds 7 --out resync.json

The trainer ranks push to a live engine of a random Qwen3 of that size, in bf16. Arms take turns in every round:

    raw        rank 0 broadcasts tensors of the same shapes, which the engine receives and discards
    off        a push without verification
    checksum   a push that compares digests of every tensor
    full       the same, and a canary request

The report has medians over rounds: the seconds of each arm, the ratio of raw's seconds to off's in the same round, and
the share of verification in checksum's seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

ARMS = ("raw", "off", "checksum", "full")
HIDDEN, LAYER_PARAMETERS = 1024, 15_730_000  # of the layers in make_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    args = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / f"respec-resync-{os.environ['MASTER_PORT']}"  # the same for every rank
    try:
        seconds, pushed = measure(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if os.environ["RANK"] == "0":
        report = summary(args, seconds, pushed)
        print(json.dumps(report, indent=2))
        if args.out:
            args.out.write_text(json.dumps(report, indent=2))


def summary(args, seconds: dict[str, list[float]], pushed: int) -> dict:
    """Compute the medians without the first round, which warms up."""
    taken = {arm: values[1:] for arm, values in seconds.items()}
    pairs = zip(taken["raw"], taken["off"], taken["checksum"], strict=True)
    ratios = [(raw / off, (checksum - off) / checksum) for raw, off, checksum in pairs]
    return {
        "tp": args.tp,
        "megabytes": pushed / 1e6,
        "bucket_mb": args.bucket_mb,
        "seconds": {arm: round(median(values), 4) for arm, values in taken.items()},
        "raw_to_push": round(median(ratio for ratio, _ in ratios), 3),
        "share_of_verification": round(median(share for _, share in ratios), 3),
        "rounds": {arm: [round(value, 4) for value in values] for arm, values in taken.items()},
    }


def measure(args, folder: Path) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of each arm in each round, and the bytes of a push."""
    import torch.distributed as dist

    from respec_trainer.actor.engine import Actor
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.resync import Resync
    from respec_trainer.resync.canary import Canary
    from respec_trainer.resync.transport import setup_transport
    from respec_trainer.rollout.fleet.fleet import RolloutFleet
    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import EngineSettings

    config = make_config(args, folder)
    topology = init_parallel(config)
    if topology.rank == 0:
        make_model(folder / "model", args.megabytes)
    dist.barrier()
    control = dist.new_group(backend="gloo")
    actor = Actor(config, topology, total_updates=1)
    fleet = RolloutFleet(config, lambda i: SGLangEngine(EngineSettings.from_config(config, "cpu", i)), control, "cpu")
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    try:
        transport = setup_transport(config, "cpu", fleet.engine, fleet.owners, control)
        resync = Resync(config, actor, None, fleet.engine, transport, control)
        canary = Canary([1, 2, 3], 4, tolerance=1.0)
        for number in range(args.rounds + 1):
            for arm in ARMS[number % 4 :] + ARMS[: number % 4]:
                dist.barrier()
                began = time.perf_counter()
                if arm == "raw":
                    raw_broadcast(resync, actor)
                else:
                    push(resync, fleet, actor, arm, canary)
                dist.barrier()
                seconds[arm].append(time.perf_counter() - began)
            resync.take_bytes()
        resync.held = {}
        (report,) = resync.push()
    finally:
        fleet.shutdown()
    shutdown_parallel()
    return seconds, report.bytes


def push(resync, fleet, actor, arm: str, canary) -> None:
    resync.held = {}  # so that the push sends everything, though nothing has changed
    resync.settings = resync.settings.model_copy(update={"verify": "off" if arm == "off" else "checksum"})
    continuation = canary.actor_continuation(actor) if arm == "full" else None
    resync.push()
    if continuation is not None:
        for sample in fleet.ask_each(canary.request()):
            canary.check(sample, continuation)


def raw_broadcast(resync, actor) -> None:
    """Broadcast tensors of the same shapes under names that no model has: the engine receives and discards them."""
    import torch
    import torch.distributed as dist

    from respec_trainer.resync.stream import flat_tensors

    transport, engine = resync.transport, resync.engine
    if engine is None:
        return
    engine.begin_weight_update("target")
    for bucket in resync._stream("target", frozen=True).buckets:
        found = [shape for planned in bucket for shape in planned.shapes.values()]
        shapes = {f"nothing.{number}": shape for number, shape in enumerate(found)}
        tensors = flat_tensors(shapes, torch.bfloat16, resync.workspace, "raw")
        answer = engine.weights.send(
            "a raw broadcast",
            "update_weights_from_distributed",
            "UpdateWeightsFromDistributedReqInput",
            names=list(shapes),
            dtypes=["bfloat16"] * len(shapes),
            shapes=[list(shape) for shape in shapes.values()],
            group_name=transport.name,
            flush_cache=False,
            selector="target",
        )
        works = [dist.broadcast(t, src=0, group=transport.group, async_op=True) for t in tensors.values()]
        for work in works:
            work.wait()
        answer.result()
    engine.end_weight_update("target", "unchanged")


def make_config(args, folder: Path):
    from respec_trainer.config import Config

    return Config.model_validate(
        {
            "run": {"name": "resync", "steps": 1, "device": "cpu"},
            "model": {"path": str(folder / "model"), "dtype": "bf16"},
            "data": {"path": "none.jsonl", "prompts_per_step": 2},
            "rollout": {
                "samples_per_prompt": 2,
                "sampling": {"max_new_tokens": 8},
                "engine": {"span": args.tp, "max_running_requests": 2},
            },
            "speculation": {"algorithm": "none"},
            "actor": {"parallel": {"tp": args.tp}},
            "resync": {"bucket_mb": args.bucket_mb},
        }
    )


def make_model(folder: Path, megabytes: int) -> None:
    """Write a random Qwen3 of about this size in bf16."""
    import torch

    from respec_trainer.compat.torchvision_cpu import define_torchvision_operators

    define_torchvision_operators()
    from transformers import AutoModelForCausalLM, Qwen3Config

    vocabulary = 32_000
    layers = max(1, round((megabytes * 1e6 / 2 - vocabulary * HIDDEN) / LAYER_PARAMETERS))
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main()
