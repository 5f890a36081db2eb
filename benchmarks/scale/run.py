"""Estimate memory, traffic and time of a step for Qwen2.5 from 3B to 72B on 16 to 1024 GPUs: docs/scale.md.

    python -m benchmarks.scale                                    # all of it: some minutes, no GPU
    python -m benchmarks.scale --models 7b --gpus 16 64 --out scale.json

Nothing here was measured. Shapes are public, the hardware's rates come from a data sheet (hardware.py), memory from the
plan (respec_trainer/plan), rollouts from the simulator with the costs of a roofline model, and traffic from counting
bytes. Engines and trainer share the GPUs; a step has one optimizer update and 512 prompts x 16 samples for every number
of GPUs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
# Models of configs/models/, with the engine's tensor parallelism.
MODELS = {"3b": 1, "7b": 1, "14b": 2, "32b": 4, "72b": 8}
GPUS = (16, 64, 256, 1024)
ACCEPTANCE = (0.75, 0.7, 0.65, 0.6, 0.55)  # by depth: an accept length of 3.0 with five drafts
CANDIDATES = [0, 1, 2, 3, 5]
PROMPTS, GROUP, PROMPT_TOKENS, LONGEST = 512, 16, 256, 8192
MEDIAN, SPREAD = 1500, 0.9  # of response lengths, log-normal, cut at LONGEST
PORTS = (400, 100)  # Gb/s of a GPU's port
MFU = 0.7  # share of Hardware.flops that training reaches
MAX_REQUESTS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    from respec_trainer.compat.deepspeed_cpu import settle_accelerator

    settle_accelerator()
    rows = [row(model, gpus) for model in args.models for gpus in args.gpus]
    print(tables(rows) + "\n\n" + elsewhere_table(args.models))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


def row(model: str, gpus: int, prompts: int = PROMPTS, longest: int = LONGEST) -> dict:
    """Return all numbers of the tables for one model on `gpus` GPUs; "fits" is False if no layout fits."""
    from benchmarks.scale.estimate import best_fit, estimate
    from benchmarks.scale.hardware import H100
    from respec_trainer.plan.part import PHASES

    hf_config, trace = shape_of(model), make_trace(prompts, longest)
    fit = best_fit(settings(MODELS[model], prompts, longest), hf_config, trace, gpus, H100)
    found = {"model": model, "gpus": gpus, "fits": fit is not None}
    if fit is None:
        return found
    step = estimate(fit, hf_config, trace, gpus, H100, CANDIDATES, MFU)
    off, on = step.rollouts["off"], step.rollouts["adaptive"]
    return found | {
        "layout": f"tp {fit.layout.tp} x dp {fit.layout.dp}, ZeRO-{fit.layout.zero}, engines tp {fit.layout.engine_tp}",
        "micro_batch_size": fit.config.actor.micro_batch_size,
        "mem_fraction": fit.config.rollout.engine.mem_fraction,
        "gb": {phase: fit.memory.total(phase) / 2**30 for phase in PHASES},
        "host_gb": fit.memory.host / 2**30,
        "slots": fit.slots,
        "samples_per_engine": len(trace) * fit.layout.engine_tp / gpus,
        "mean_batch": off.mean_batch,
        "push_gb": {"within": step.push.collected.within / 1e9, "across": step.push.collected.across / 1e9},
        "delivered_gb": step.push.delivered.within / 1e9,
        "training_gb": {"within": step.training.within / 1e9, "across": step.training.across / 1e9},
        "seconds": {
            "generate": off.makespan,
            "generate_speculating": on.makespan,
            "train": step.training_seconds(H100),
            "computing": step.computing,
            "push": step.push.seconds(H100),
            "step": step.seconds("off", H100),
            "step_speculating": step.seconds("adaptive", H100),
        },
        "off_fraction": on.off_fraction,
    }


def shape_of(model: str):
    """Return the Hugging Face config of a model of MODELS; there are no weights."""
    from respec_trainer.compat.torchvision_cpu import define_torchvision_operators

    define_torchvision_operators()
    from respec_trainer.preflight.checks import read_model_config

    return read_model_config(REPOSITORY / f"configs/models/qwen2.5-{model}.json")


def settings(engine_tp: int, prompts: int, longest: int):
    """Return the run's configuration, except the settings that `best_fit` chooses."""
    from respec_trainer.config import Config

    return Config.model_validate(
        {
            "run": {"name": "scale", "steps": 1, "device": "cuda"},
            "model": {"path": "shapes-only"},
            "data": {"path": "none.jsonl", "prompts_per_step": prompts, "max_prompt_tokens": PROMPT_TOKENS},
            "rollout": {
                "samples_per_prompt": GROUP,
                "sampling": {"max_new_tokens": longest},
                "engine": {"tp": engine_tp, "max_running_requests": MAX_REQUESTS},
            },
            "speculation": {"algorithm": "eagle3", "steps": max(CANDIDATES), "draft_tokens": max(CANDIDATES) + 1},
            "drafter": {"path": "shapes-only", "weighting": "uniform", "micro_batch_size": 1, "memory_mb": 16384},
            "actor": {"recompute": True},
        }
    )


def make_trace(prompts: int, longest: int):
    """Make the trace of one step, the same for every model and cluster."""
    from respec_trainer.speculation.simulation.trace import Trace

    count = prompts * GROUP
    lengths = np.random.default_rng(0).lognormal(np.log(MEDIAN), SPREAD, count).astype(int) + 1
    acceptance = np.tile(np.array(ACCEPTANCE), (count, 1))
    prompt = np.full(count, PROMPT_TOKENS)
    return Trace(prompt, np.minimum(lengths, longest), np.arange(count) // GROUP, acceptance)


def tables(rows: list[dict]) -> str:
    """Return three Markdown tables: memory, time, traffic."""
    fitting = [row for row in rows if row["fits"]]
    missing = [f"{row['model']} on {row['gpus']}" for row in rows if not row["fits"]]
    parts = [memory_table(fitting), time_table(fitting), traffic_table(fitting)]
    return "\n\n".join(parts + ([f"No layout fits: {', '.join(missing)}."] if missing else []))


def memory_table(rows: list[dict]) -> str:
    head = ["model", "GPUs", "layout", "micro-batch", "generate", "train", "resync", "host", "slots"]
    body = []
    for r in rows:
        gigabytes = [f"{gb:.0f}" for gb in (*r["gb"].values(), r["host_gb"])]
        body.append([r["model"], r["gpus"], r["layout"], r["micro_batch_size"], *gigabytes, r["slots"]])
    return markdown(head, body)


def time_table(rows: list[dict]) -> str:
    head = ["model", "GPUs", "samples an engine", "generate", "speculating", "gain", "train", "push", "step", "gain"]
    body = []
    for r in rows:
        s = r["seconds"]
        times = [f"{s['generate']:.0f}", f"{s['generate_speculating']:.0f}"]
        times += [f"{s['generate'] / s['generate_speculating']:.2f}", f"{s['train']:.0f}", f"{s['push']:.2f}"]
        times += [f"{s['step_speculating']:.0f}", f"{s['step'] / s['step_speculating']:.2f}"]
        body.append([r["model"], r["gpus"], f"{r['samples_per_engine']:.0f}", *times])
    return markdown(head, body)


def traffic_table(rows: list[dict]) -> str:
    head = ["model", "GPUs", "push: host", "push: network", "into engine", "training: host", "training: network"]
    body = [
        [
            r["model"],
            r["gpus"],
            *(f"{r['push_gb'][way]:.1f}" for way in ("within", "across")),
            f"{r['delivered_gb']:.1f}",
            *(f"{r['training_gb'][way]:.0f}" for way in ("within", "across")),
        ]
        for r in rows
    ]
    return markdown(head, body)


def elsewhere_table(models: list[str]) -> str:
    """Return a table of pushes to engines on GPUs of their own: one broadcast, however many ranks receive it."""
    from dataclasses import replace

    from benchmarks.scale.hardware import H100
    from benchmarks.scale.traffic import Layout, push
    from respec_trainer.plan.memory import drafter_sizes
    from respec_trainer.plan.sizes import model_parameters

    head = ["model", "GB", *(f"s at {gigabits} Gb/s" for gigabits in PORTS)]
    body = []
    for model in models:
        hf_config, tp = shape_of(model), MODELS[model]
        drafter = drafter_sizes(settings(tp, PROMPTS, LONGEST), hf_config, None).parameters
        apart = Layout(tp=tp, dp=1, zero=1, engine_tp=tp, colocated=False)
        sent = push(model_parameters(hf_config), drafter, apart, H100)
        times = [sent.seconds(replace(H100, across=0.8 * gigabits / 8 * 1e9)) for gigabits in PORTS]
        body.append([model, f"{sent.delivered.across / 1e9:.1f}", *(f"{seconds:.2f}" for seconds in times)])
    return markdown(head, body)


def markdown(head: list, body: list[list]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
