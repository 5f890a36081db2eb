"""Print a plan as tables: the place of each rank, and the memory of each part in each phase."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from respec_trainer.config import Config
from respec_trainer.plan.memory import GB, MemoryPlan
from respec_trainer.plan.part import PHASES
from respec_trainer.plan.places import Layout, RankPlace

MOST_RANKS = 64  # most ranks that get a row of their own


def show(
    console: Console, config: Config, layout: Layout | None, memory: list[MemoryPlan], problems: list[str]
) -> None:
    """Print the layout, if it could be planned, the memory plans and every problem."""
    if layout is not None:
        console.print(Text(_headline(config, layout), style="bold"))
        console.print(Group(*_places(layout), *_connections(config, layout)))
    for plan in memory:
        console.print(_memory(plan))
    for problem in problems:
        console.print(Text.assemble(("problem: ", "bold red"), problem))
    count = len(problems)
    words = "no problem found" if not count else f"{count} problem{'s' if count > 1 else ''} found"
    console.print(Text(words, style="bold red" if count else "bold green"))


def _headline(config: Config, layout: Layout) -> str:
    cluster, placement = layout.cluster, layout.placement
    where = "GPUs" if cluster.device == "cuda" else "ranks without a GPU"
    return (
        f"{config.run.name}: {cluster.hosts} x {cluster.ranks_per_host} {where}, {config.rollout.placement}: tp "
        f"{layout.tp} x dp {layout.dp}, ZeRO-{config.actor.zero.stage}; {placement.engines} engines, each of tp "
        f"{config.rollout.engine.tp} over {placement.span} rank{'s' if placement.span > 1 else ''}"
    )


def _places(layout: Layout) -> Iterator[RenderableType]:
    table = Table("rank", "host", "device", "tp", "dp", "engine", box=None, header_style="dim")
    for place in layout.ranks[:MOST_RANKS]:
        cells = (place.rank, place.host, place.device, _number(place.tp_rank), _number(place.dp_rank), _engine(place))
        table.add_row(*map(str, cells))
    yield table
    if len(layout.ranks) > MOST_RANKS:
        yield Text(f"... and so on up to rank {len(layout.ranks) - 1}")


def _engine(place: RankPlace) -> str:
    roles = [
        f"{verb} {number}" for verb, number in (("starts", place.starts), ("feeds", place.feeds)) if number is not None
    ]
    device = f"{place.engine}" if place.engine is not None else "-"
    return f"{device} ({', '.join(roles)})" if roles else device


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _connections(config: Config, layout: Layout) -> Iterator[RenderableType]:
    address, port = os.environ.get("MASTER_ADDR", "the first host"), os.environ.get("MASTER_PORT")
    where = f"port {port}" if port else "the launcher's port"
    backend = "NCCL, in small messages over gloo" if layout.cluster.device == "cuda" else "gloo"
    yield Text(f"ranks meet at {address}, {where}, and communicate over {backend}")
    if layout.cluster.hosts > 1:
        yield Text(f"the watchdog sends UDP packets to {address}, {where}: let them pass between the hosts")
    meeting = f"at port {config.resync.port or 'any free one'}"
    meeting = "by memory handles" if layout.transport == "cuda_ipc" else meeting
    yield Text(f"weights reach the engines over {layout.transport}, {meeting}; engines listen on free ports")


def _memory(plan: MemoryPlan) -> Table:
    table = Table(title=f"GB of a GPU that {plan.name}, estimated", title_justify="left", box=None, header_style="dim")
    table.add_column("")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    table.add_column("from", style="dim")
    for part in plan.parts:
        cells = [f"{part.bytes / GB:.2f}" if phase in part.phases else "" for phase in PHASES]
        table.add_row(part.name, *cells, part.how)
    totals = [f"{plan.total(phase) / GB:.2f}" for phase in PHASES]
    table.add_row("all", *totals, f"of {plan.gpu / GB:.1f}", style="bold")
    table.caption = f"{plan.host / GB:.1f} GB of host memory for each such GPU; samples of up to {plan.longest} tokens"
    table.caption_justify = "left"
    return table
