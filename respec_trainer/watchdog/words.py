"""The watchdog's messages: which rank, on which host, in which phase, and where the other ranks were."""

from __future__ import annotations

from collections.abc import Sequence

from respec_trainer.watchdog.messages import MOST_CHARACTERS, Beat

GO_ON = "The run ends on all ranks; checkpoints are unchanged, and if started again it resumes from the last one."
STACKS_SHOWN = 3


def died_text(dead: Sequence[Beat], others: Sequence[Beat]) -> str:
    verb = "has" if len(dead) == 1 else "have"
    return _text(f"{_who(dead)} {verb} ended without a message, in {_places(dead)}.", _where(others))


def silent_text(silent: Sequence[Beat], seconds: float, others: Sequence[Beat]) -> str:
    what = (
        f"{_who(silent)} gave no sign of life for {seconds:.0f} s (run.lost_after), last in {_places(silent)}: the "
        "process is stopped or gone, or its host, or the link to it."
    )
    return _text(what, _where(others))


def absent_text(ranks: Sequence[int], seconds: float, met: bool) -> str:
    if not met:
        return _text(f"{_ranks(ranks)} did not come within {seconds:.0f} s of the start (run.hang_timeout).")
    return _text(
        f"{_ranks(ranks)} met the others in a process group, but gave the watchdog no sign within {seconds:.0f} s "
        "(run.lost_after): it ended at once, or UDP does not pass between the hosts at the port of MASTER_PORT."
    )


def ended_text(ended: Sequence[Beat], others: Sequence[Beat]) -> str:
    return _text(f"{_who(ended)} ended by {ended[0].note} in {_places(ended)}.", _where(others))


def failed_text(failed: Beat) -> str:
    return _text(f"{_who([failed])} failed in {failed.place}: {failed.note}")


def hanging_text(hanging: Sequence[Beat], others: Sequence[Beat], limit: float) -> str:
    seconds = max(beat.still for beat in [*hanging, *others])
    verb = "hangs" if len(hanging) == 1 else "hang"
    what = (
        f"{_who(hanging)} {verb} in {_places(hanging)}: {seconds:.0f} s without progress (run.hang_timeout {limit:g})."
    )
    stacks = [f"Stack of rank {beat.rank}, the last call last:\n{beat.stack}" for beat in hanging if beat.stack]
    more = [f"{len(stacks) - STACKS_SHOWN} more are left out."] if len(stacks) > STACKS_SHOWN else []
    return _text(what, _where(others), *stacks[:STACKS_SHOWN], *more)


def _text(*parts: str) -> str:
    text = "\n".join(part.rstrip() for part in parts if part)
    return f"{text[:MOST_CHARACTERS]}\n{GO_ON}"


def _who(beats: Sequence[Beat]) -> str:
    """Return the ranks host by host: "rank 3 on host-b (process 71)", "ranks 2, 3 on host-b" ..."""
    hosts: dict[str, list[Beat]] = {}
    for beat in beats:
        hosts.setdefault(beat.process.host, []).append(beat)
    return " and ".join(
        f"{_ranks([beat.rank for beat in on_host])} on {host}"
        + (f" (process {on_host[0].process.pid})" if len(on_host) == 1 else "")
        for host, on_host in hosts.items()
    )


def _places(beats: Sequence[Beat]) -> str:
    return " and ".join(dict.fromkeys(beat.place for beat in beats))


def _where(others: Sequence[Beat]) -> str:
    """Return where the other ranks were, grouped by phase and step."""
    places: dict[str, list[int]] = {}
    for beat in others:
        places.setdefault(beat.place, []).append(beat.rank)
    return "; ".join(f"{_ranks(ranks)} in {place}" for place, ranks in places.items())


def _ranks(ranks: Sequence[int]) -> str:
    """Return "rank" or "ranks" and the numbers, with runs of them as first-last."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    words = [f"{part[0]}-{part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
