"""Compare adaptive speculation with every fixed choice, on skewed rollouts of the real engine.

    python benchmarks/speculation.py run --config my.yaml --profile profile.json --accept 1 1.5 2 3 --out results
    python benchmarks/speculation.py run --config my.yaml --profile profile.json --accept drafter --out results
    python benchmarks/speculation.py simulate --profile profile.json --out results

Response lengths are heavy-tailed and the same for all arms. The arms take turns in a random order each round: an engine
without speculation, and an engine whose draft steps can change, with these policies: off; every fixed number of steps;
switched, a fixed number of steps up to a batch size and off above it (both chosen by replaying the trace with the times
of one round of the fixed arms, which is not counted); and adaptive. `--accept` gives simulated accept lengths of the
longest chain, on random prompts; `drafter` stands for the acceptance of the run's own drafter on its data. The arm
`adaptive` starts from the neutral prior every time, like a run's first rollout. The arm `warm` starts from the state at
the end of its last rollout, like a run's later rollouts; its first state comes from an adaptive rollout that is not
counted.

Regret needs all fixed arms and two rounds. It is against the best of what cycle_table.references names, by times that
the fixed arms took in the other half of the rounds; no cost model is in it.

`simulate` replays the recorded rollouts with the simulator of tools/simulate_rollout.py and prints its errors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from cycle_table import CycleTable, regrets

from respec_trainer.config import Config
from respec_trainer.config_file import load_config
from respec_trainer.rollout.decode_log import DecodeLog, DepthSettings
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang.inside.simulated_acceptance import kept_rate
from respec_trainer.speculation.acceptance import depth_acceptance
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.policy import ThresholdPolicy
from respec_trainer.speculation.profiling.fit import fit_costs
from respec_trainer.speculation.profiling.machine import identity_of
from respec_trainer.speculation.profiling.profile import Profile, load_profile
from respec_trainer.speculation.profiling.settings import (
    NEUTRAL,
    adaptive_settings,
    longest_sequence,
    read_drafter_config,
)
from respec_trainer.speculation.simulation.replay import candidates_of, policy_named
from respec_trainer.speculation.simulation.simulator import Setting, simulate
from respec_trainer.speculation.simulation.trace import Trace

THRESHOLD = "respec_trainer.speculation.policy:ThresholdPolicy"
PLAIN, ADAPTIVE, WARM = "no speculation", "adaptive", "warm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--config", required=True, help="model, drafter, engine, and prompts for `--accept drafter`")
    run.add_argument("--accept", nargs="+", default=["1", "1.5", "2", "3"])
    run.add_argument("--requests", type=int, default=64)
    run.add_argument("--median", type=float, default=64, help="of the lengths' lognormal distribution, sigma 0.8")
    run.add_argument("--longest", type=int, default=384)
    run.add_argument("--prompt", type=int, default=32, help="tokens of a random prompt")
    run.add_argument("--arms", nargs="+", help="beside adaptive; of plain, s=0 (off), s=1, ..., switched; default: all")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument(
        "--timed", action="store_true", help="on a CPU, log only the time in which the engine's thread computed"
    )
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("overrides", nargs="*", metavar="section.key=value")
    replayed = commands.add_parser("simulate")
    for each in (run, replayed):
        each.add_argument("--profile", type=Path, required=True)
        each.add_argument("--out", type=Path, required=True, help="folder of recorded rollouts")
    args = parser.parse_args()
    (run_arms if args.command == "run" else replay_recorded)(args)


@dataclass(frozen=True)
class Bench:
    """The inputs that all rollouts share."""

    config: Config
    profile: Profile
    costs: CostModel
    requests: list[Request]
    longest: int  # most tokens of a sequence
    timed: bool  # logs hold the computing time of the engine's thread: other work on the machine is not in them

    @property
    def candidates(self) -> tuple[int, ...]:
        return tuple(candidates_of(self.profile))

    def trace(self, acceptance: list[float]) -> Trace:
        prompts = np.array([len(request.prompt_ids) for request in self.requests])
        lengths = np.array([request.sampling.max_new_tokens for request in self.requests])
        rows = np.tile(np.array(acceptance), (len(lengths), 1))
        return Trace(prompts, lengths, np.arange(len(lengths)), rows)

    def steps(self, arm: str, accept: float | None) -> DepthSettings:
        common = {"candidates": self.candidates, "max_batch": len(self.requests), "max_context": self.longest}
        common |= {"simulated_accept_length": accept, "timed": self.timed}
        if arm in (ADAPTIVE, WARM):
            return adaptive_settings(self.costs, **common)
        steps, _, largest = arm.removeprefix("s=").partition("<=")
        if largest:
            common["max_batch"] = int(largest)
            return DepthSettings("adaptive", fixed=int(steps), policy=THRESHOLD, **common)
        return DepthSettings("fixed", fixed=int(steps), **common)


def run_arms(args: argparse.Namespace) -> None:
    bench = prepare_bench(args)
    args.out.mkdir(parents=True, exist_ok=True)
    simulated = [None if accept == "drafter" else float(accept) for accept in args.accept]
    plain = PlainArm(bench)
    try:
        for with_drafter in sorted({accept is None for accept in simulated}):
            engine = start_engine(bench, bench.steps("s=0", None if with_drafter else 1.0))
            try:
                for steps in bench.candidates:
                    engine.set_steps(bench.steps(f"s={steps}", None if with_drafter else 1.0))
                    warm_up(bench, engine)
                for accept in (each for each in simulated if (each is None) == with_drafter):
                    compare_arms(bench, plain, engine, accept, args)
            finally:
                engine.shutdown()
    finally:
        plain.close()


def prepare_bench(args: argparse.Namespace) -> Bench:
    from respec_trainer.compat import prepare, resolve_device

    config = load_config(args.config, args.overrides)
    prepare(config.run.device)
    from transformers import AutoConfig

    model, profile = AutoConfig.from_pretrained(config.model.path), load_profile(args.profile)
    identity = identity_of(config, model.to_dict(), read_drafter_config(config), resolve_device(config.run.device))
    profile.check_fits(identity, str(args.profile))
    generator = np.random.default_rng(args.seed)
    lengths = np.minimum(generator.lognormal(np.log(args.median), 0.8, args.requests).astype(int) + 1, args.longest)
    prompts = generator.integers(0, model.vocab_size, (args.requests, args.prompt)).tolist()
    if "drafter" in args.accept:
        prompts = prompts_of_run(config, args.requests)
    how = SamplingParams(1, config.rollout.sampling.temperature, ignore_eos=True)
    requests = [
        Request(str(row), tuple(prompt), replace(how, max_new_tokens=int(length)))
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    return Bench(config, profile, fit_costs(profile), requests, longest_sequence(config, model), args.timed)


def prompts_of_run(config: Config, count: int) -> list[tuple[int, ...]]:
    from transformers import AutoTokenizer

    from respec_trainer.data.prompts import load_prompts

    found = load_prompts(config.data, AutoTokenizer.from_pretrained(config.model.path), config.data.max_prompt_tokens)
    return [prompt.ids for prompt in found[:count]]


def start_engine(bench: Bench, steps: DepthSettings | None):
    """Start an engine with changing draft steps, or without speculation (None)."""
    from respec_trainer.compat import prepare, resolve_device
    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import NO_SPECULATION, EngineSettings

    prepare(bench.config.run.device)
    settings = EngineSettings.from_config(bench.config, resolve_device(bench.config.run.device))
    settings = replace(settings, steps=steps)
    if steps is None:
        settings = replace(settings, speculation=NO_SPECULATION, drafter_path=None)
    engine = SGLangEngine(settings)
    engine.start()
    return engine


def warm_up(bench: Bench, engine) -> None:
    """Decode a few steps of every request: the first steps of an engine take longer."""
    short = [replace(request, sampling=replace(request.sampling, max_new_tokens=8)) for request in bench.requests]
    engine.submit(short).collect()


class PlainArm:
    """The engine without speculation, in a process of its own, because a process can hold one engine only."""

    def __init__(self, bench: Bench):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_plain, args=(bench, theirs))
        self.process.start()
        self.pipe.recv()  # ready

    def generate(self) -> float:
        """Generate one rollout; return its seconds."""
        self.pipe.send("go")
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def serve_plain(bench: Bench, pipe) -> None:
    engine = start_engine(bench, None)
    try:
        warm_up(bench, engine)
        pipe.send("ready")
        while pipe.recv() is not None:
            flush_prefix_cache(engine)
            began = time.perf_counter()
            engine.submit(bench.requests).collect()
            pipe.send(time.perf_counter() - began)
    finally:
        engine.shutdown()


def compare_arms(bench: Bench, plain: PlainArm, engine, accept: float | None, args: argparse.Namespace) -> None:
    """Run all arms in turns; write each rollout's log, and a table."""
    name = "drafter" if accept is None else f"{accept:g}"
    acceptance = measured_acceptance(bench, engine) if accept is None else simulated_acceptance(bench, accept)
    trace = bench.trace(acceptance)
    threshold = best_threshold(bench, engine, accept, trace) if "switched" in (args.arms or ["switched"]) else ""
    known = {"plain": PLAIN, **{f"s={steps}": f"s={steps}" for steps in bench.candidates}, "switched": threshold}
    arms = [*(known[arm] for arm in args.arms or known), ADAPTIVE, WARM]
    print(f"accept {name}: acceptance {', '.join(f'{a:.2f}' for a in acceptance)}; switched: {threshold}", flush=True)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    clocked: dict[str, list[float]] = {}
    logs: dict[str, list[DecodeLog]] = {}
    state = generate(bench, engine, ADAPTIVE, accept)[1].state
    for number in range(args.rounds):
        for arm in random.Random(f"{args.seed}:{number}").sample(arms, len(arms)):
            if arm == PLAIN:
                taken, log = plain.generate(), DecodeLog()
            else:
                taken, log = generate(bench, engine, arm, accept, state if arm == WARM else "")
            state = log.state if arm == WARM else state
            seconds[arm].append(taken)
            if len(log):
                clocked.setdefault(arm, []).append(engine_seconds(log))
                logs.setdefault(arm, []).append(log)
            if arm not in (PLAIN, WARM):
                path = args.out / f"{name}_{arm.replace('<=', 'upto')}_{number}.npz"
                record(path, bench, arm, acceptance, log)
            print(f"  round {number} {arm:16s} {taken:7.2f} s  {describe(log)}", flush=True)
    summarize(name, seconds, threshold, args.out / f"summary_{name}.json")
    print("  by the engine's own clock:")
    summarize(name, clocked, threshold, args.out / f"clocked_{name}.json")
    show_regrets(bench, logs, trace, args.out / f"regret_{name}.json")


def generate(bench: Bench, engine, arm: str, accept: float | None, state: str = "") -> tuple[float, DecodeLog]:
    engine.set_steps(bench.steps(arm, accept))
    if state:
        engine.restore_depth_chooser(state)
    flush_prefix_cache(engine)
    began = time.perf_counter()
    engine.submit(bench.requests).collect()
    return time.perf_counter() - began, engine.take_decode_log()


def flush_prefix_cache(engine) -> None:
    """Make the engine read every prompt again, as after a push of weights: all rollouts have the same prompts."""
    process = engine.process
    if not process.wait(process.call(process.manager.flush_cache), "flushing the prefix cache").success:
        raise SystemExit("the engine could not flush its prefix cache: requests were still running")


def simulated_acceptance(bench: Bench, accept: float) -> list[float]:
    return [kept_rate(accept, bench.candidates[-1])] * bench.candidates[-1]


def measured_acceptance(bench: Bench, engine) -> list[float]:
    """Measure the acceptance by depth of the run's drafter, always with the most draft steps."""
    _, log = generate(bench, engine, f"s={bench.candidates[-1]}", None)
    kept = [int(log.batch[~log.prefill].sum()), *log.survivors.sum(0).tolist()]
    return depth_acceptance([before - after for before, after in zip(kept, [*kept[1:], 0], strict=True)])


def best_threshold(bench: Bench, engine, accept: float | None, trace: Trace) -> str:
    """Return the name of the fastest policy for this trace among fixed draft steps that are off above a batch size.

    By the times of one rollout with each fixed number of steps, made for this.
    """
    logs = {steps: [generate(bench, engine, f"s={steps}", accept)[1]] for steps in bench.candidates}
    table, setting = CycleTable(logs), Setting(slots=len(trace), sampled=False)
    sizes = sorted({cell.batch for cell in bench.profile.cells})

    def makespan(choice: tuple[int, int]) -> float:
        return simulate(trace, table, lambda: ThresholdPolicy(*choice), setting).makespan

    steps, size = min(((steps, size) for steps in bench.candidates[1:] for size in sizes), key=makespan)
    return f"s={steps}<={size}"


def show_regrets(bench: Bench, logs: dict[str, list[DecodeLog]], trace: Trace, out: Path) -> None:
    """Print and write each arm's regret by round; nothing without all fixed arms or with one round."""
    fixed = {steps: logs.get(f"s={steps}", []) for steps in bench.candidates}
    if any(len(some) < 2 for some in fixed.values()):
        print("  no regret: it needs every fixed arm, and two rounds")
        return
    found = regrets(fixed, logs, trace)
    for arm, rounds in found.items():
        values = ", ".join(f"{value:.1%}" for value, _ in rounds)
        print(f"  regret of {arm:16s} {values}; {min(share for _, share in rounds):.0%} of its batches were measured")
    out.write_text(json.dumps(found, indent=1))


def describe(log: DecodeLog) -> str:
    if not len(log):
        return ""
    decode = ~log.prefill
    off = np.nansum(log.period[decode & (log.steps == 0)]) / np.nansum(log.period[decode])
    changes = int((np.diff(log.steps[decode]) != 0).sum())
    gained = log.tokens[decode].sum() / log.batch[decode].sum()
    failed = f"  FAILURES {log.failures}" if log.failures else ""
    return f"off {off:4.0%}  changes {changes:3d}  tokens a sequence and batch {gained:.2f}{failed}"


def engine_seconds(log: DecodeLog) -> float:
    """Return the seconds from the first batch's start to the last batch's end, by the engine's clock."""
    return float(log.start[-1] - log.start[0] + log.draft[-1] + log.verify[-1] + log.extend[-1])


def summarize(name: str, seconds: dict[str, list[float]], threshold: str, out: Path) -> None:
    """Print and write the ratio of each arm's makespan to adaptive's in the same round: median and quartiles."""
    fixed = [arm for arm in seconds if arm not in (PLAIN, ADAPTIVE, WARM, threshold)]
    best = min(fixed, key=lambda arm: median(seconds[arm]), default=None)
    compared = {"plain": PLAIN, "off": "s=0", "best static": best, "static + on/off": threshold}
    row = {"accept": name, "seconds": seconds, "best_static": best, "switched": threshold}
    for own in (ADAPTIVE, WARM):
        rounds = {arm: np.array(taken) / np.array(seconds[own]) for arm, taken in seconds.items()}
        row[own] = {arm: median(each) for arm, each in rounds.items()}
        for label, arm in ((label, arm) for label, arm in compared.items() if arm in seconds):
            low, high = np.quantile(rounds[arm], (0.25, 0.75))
            print(
                f"  {own} is {row[own][arm]:.3f} ({low:.3f} to {high:.3f}) times as fast as {label} ({arm})", flush=True
            )
    out.write_text(json.dumps(row, indent=1))


def record(path: Path, bench: Bench, arm: str, acceptance: list[float], log: DecodeLog) -> None:
    trace = bench.trace(acceptance)
    np.savez(
        path,
        arm=arm,
        makespan=engine_seconds(log),
        prompt=trace.prompt,
        length=trace.length,
        acceptance=trace.acceptance,
        **{f"log_{key}": value for key, value in log.to_arrays().items()},
    )


def replay_recorded(args: argparse.Namespace) -> None:
    """Compare simulated makespans with the recorded ones, by the engine's clock."""
    profile = load_profile(args.profile)
    costs, errors = fit_costs(profile), []
    for path in sorted(args.out.glob("*.npz")):
        with np.load(path) as found:
            trace = Trace(found["prompt"], found["length"], np.arange(len(found["length"])), found["acceptance"])
            arm, makespan = str(found["arm"]), float(found["makespan"])
        candidates = candidates_of(profile)
        prior = [NEUTRAL] * candidates[-1]
        make = policy_named(arm, costs, candidates, trace, Setting(slots=len(trace)), prior)
        simulated = simulate(trace, costs, make, Setting(slots=len(trace))).makespan
        errors.append(simulated / makespan - 1)
        print(f"{path.stem:28s} engine {makespan:7.2f} s  simulated {simulated:7.2f} s  {errors[-1]:+.1%}")
    print(f"{len(errors)} rollouts: off by {np.abs(errors).mean():.1%} on average, {np.abs(errors).max():.1%} at most")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
