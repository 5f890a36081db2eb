"""Measure the costs of speculation on this machine with a run's models: once, before runs with adaptive speculation.

    python tools/profile_speculation.py --config configs/quickstart.yaml --out profile.json
    python tools/profile_speculation.py --config my.yaml --out profile.json --steps 1 2 4 --trees 3,2,6 5,4,16
    ... --quick                                           # two minutes, for a first look

Then set speculation.policy=adaptive and speculation.profile=profile.json. The tool measures decoding, drafting,
verifying and the drafter's catching up, by batch size (up to rollout.engine.max_running_requests) and context. If it is
interrupted, the same command continues the measurement. Beside the profile it writes a heat map of the predicted
speed-ups (.png) and SGLang's own table of draft steps by batch size (.sglang.json), which works without this package's
plugin.

The machine should be otherwise idle. Each tree (steps,topk,draft_tokens) starts an engine of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

SIMULATED = 2.0  # tokens a pass, as with an average drafter: the engine's own work depends on them a little


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--out", type=Path, required=True, help="the profile to write")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 5], help="draft steps (default 1 2 3 5)")
    parser.add_argument("--trees", nargs="+", default=[], metavar="S,T,N", help="trees to measure as well")
    parser.add_argument("--quick", action="store_true", help="fewer batch sizes and contexts, once each")
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="no repeat begins after this (default 9; for each tree a third of it)",
    )
    parser.add_argument(
        "--acceptance",
        default="0.8,0.75,0.7,0.65,0.6",
        help="acceptance by depth for the printed tables; each further branch of a tree gets half of the rest",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    from respec_trainer.errors import RespecError

    try:
        return profile(args)
    except RespecError as error:
        print(f"profile_speculation: {error}", file=sys.stderr)
        return 2


def profile(args: argparse.Namespace) -> int:
    from respec_trainer.compat import prepare, resolve_device
    from respec_trainer.config_file import load_config
    from respec_trainer.speculation.shape import parse_shape
    from respec_trainer.speculation.simulation.replay import parse_acceptance

    warnings.filterwarnings("ignore")  # libraries warn about missing hardware
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    trees, acceptance = [parse_shape(text) for text in args.trees], parse_acceptance(args.acceptance)
    config = load_config(args.config, args.overrides)
    prepare(config.run.device)
    device = resolve_device(config.run.device)
    found = measure_chains(args, config, device)
    for shape in trees:
        cells = measure_tree(config, device, shape, found, 1 if args.quick else 3, args.minutes / 3)
        cells += [cell for cell in found.cells if cell.shape != shape]
        found = found.model_copy(update={"cells": cells})
        found.save(args.out)
    report(found, args.out, acceptance)
    return 0


def measure_chains(args: argparse.Namespace, config, device: str):
    from transformers import AutoConfig

    from respec_trainer.rollout.decode_log import DepthSettings
    from respec_trainer.speculation.profiling.machine import identity_of
    from respec_trainer.speculation.profiling.measure import Plan, measure
    from respec_trainer.speculation.profiling.settings import check_can_adapt, longest_sequence, read_drafter_config

    check_can_adapt(config)
    model = AutoConfig.from_pretrained(config.model.path)
    most, longest = config.rollout.engine.max_running_requests, longest_sequence(config, model)
    plan = Plan.of(most, longest, sorted({0, *args.steps}), device, args.quick, args.minutes)
    identity = identity_of(config, model.to_dict(), read_drafter_config(config), device)
    steps = DepthSettings("random", plan.candidates, most, longest, timed=True, simulated_accept_length=SIMULATED)
    # A prompt that is read in two passes occupies two slots until it has been read.
    slots = config.rollout.engine.model_copy(update={"max_running_requests": most + 1})
    with running(config, device, steps=steps, engine=slots) as engine, progress_bar("chains") as progress:
        return measure(engine, plan, identity, config.rollout.sampling, model.vocab_size, args.out, progress)


def measure_tree(config, device: str, shape, found, repeats: int, minutes: float):
    from transformers import AutoConfig

    from respec_trainer.config import SpeculationConfig
    from respec_trainer.speculation.profiling.trees import tree_cells

    vocabulary = AutoConfig.from_pretrained(config.model.path).vocab_size
    speculation = SpeculationConfig(steps=shape.steps, topk=shape.topk, draft_tokens=shape.draft_tokens)
    with running(config, device, speculation=speculation) as engine, progress_bar(f"tree {shape}") as progress:
        return tree_cells(engine, shape, found, config.rollout.sampling, vocabulary, repeats, minutes, progress)


@contextmanager
def running(config, device: str, **changes):
    """Start the run's engine with some of its settings changed, and shut it down at the end."""
    from dataclasses import replace

    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import EngineSettings

    settings = EngineSettings.from_config(config, device)
    if "engine" in changes:
        changes["engine"] = changes["engine"].model_copy(update={"max_total_tokens": settings.engine.max_total_tokens})
    engine = SGLangEngine(replace(settings, **changes))
    try:
        engine.start()
        yield engine
    finally:
        engine.shutdown()


@contextmanager
def progress_bar(name: str):
    """Show a progress bar; yield the function that updates it, progress(done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def report(found, out: Path, acceptance: list[float]) -> None:
    """Print the error of the fitted costs and the table of speed-ups; write the heat map and SGLang's table."""
    from rich.console import Console

    from respec_trainer.speculation.acceptance import ranks
    from respec_trainer.speculation.profiling.fit import describe_forms, fit_forms
    from respec_trainer.speculation.profiling.held_out import held_out
    from respec_trainer.speculation.profiling.solver import Solver, measured_table
    from respec_trainer.speculation.profiling.table import write_engine_table
    from respec_trainer.speculation.profiling.view import heat_map, render
    from respec_trainer.speculation.shape import OFF

    console = Console(width=120)
    spread = sorted(cell.times["plain"].spread for cell in found.cells if "plain" in cell.times)
    console.print(f"{out}: {len(found.cells)} cells, repeats of plain steps spread by {spread[len(spread) // 2]:.1%}")
    console.print(str(held_out(found)))
    console.print(describe_forms(*fit_forms(found.cells, found.graph_sizes)))
    solver = Solver.of(found)
    chains = Solver(solver.costs, tuple(shape for shape in solver.shapes if shape.is_chain))
    plain = [cell for cell in found.cells if cell.shape == OFF and cell.decodes]
    batches, contexts = sorted({cell.batch for cell in plain}), sorted({cell.context for cell in plain})
    table = chains.table(batches, contexts[len(contexts) // 2], acceptance)
    console.print(render(table))
    if len(solver.shapes) > len(chains.shapes):
        topk = max(shape.topk for shape in solver.shapes)
        by_rank = [ranks(first, topk) for first in acceptance]
        console.print(*(render(measured_table(found, context, by_rank)) for context in contexts[:-1]))
    heat_map(table, out.with_suffix(".png"))
    write_engine_table(table.policy(), out.with_suffix(".sglang.json"))


if __name__ == "__main__":
    sys.exit(main())
