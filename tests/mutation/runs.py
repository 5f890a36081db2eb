"""Mutation runs: draw mutants, run tests on each in a workplace, note whether they notice it."""

from __future__ import annotations

import os
import pickle
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from respec_trainer.processes import parent_death_signal
from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.table import Module, equivalents
from tests.mutation.workplace import PASSED, Outcome, Workplace, wait

# With a mutant, tests may take SLOWER times as long as without one, and PATIENCE seconds more.
PATIENCE, SLOWER = 20.0, 3.0


@dataclass(frozen=True)
class Result:
    module: Module
    mutant: Mutant
    noticed: bool
    slow: bool = False  # noticed because the tests did not end


def drawn(root: Path, module: Module, most: int, seed: int) -> list[Mutant]:
    """Return at most `most` mutants of a module, chosen by the seed, in the order of its lines; no equivalent ones."""
    same = equivalents()
    found = [mutant for mutant in mutants_of(root, module.path) if mutant.key not in same]
    chosen = random.Random(f"{seed}/{module.path}").sample(found, min(most, len(found)))
    return sorted(chosen, key=lambda mutant: (mutant.line, mutant.start))


def run(root: Path, modules: Sequence[Module], most: int, seed: int, workers: int, place: Path) -> list[Result]:
    """Plant mutants of the modules, at most `most` in each, in `workers` copies of the repository below `place`."""
    workplaces = [Workplace(root, place / "0")]
    packages = dict.fromkeys(module.package for module in modules)
    seconds = {package: _seconds(workplaces[0], modules, package) for package in packages}
    workplaces += [Workplace(place / "0", place / str(number), bytecode=True) for number in range(1, workers)]
    tasks = [(module, mutant) for module in modules for mutant in drawn(root, module, most, seed)]
    parts = [tasks[number::workers] for number in range(workers)]
    pids = [_fork(*pair, seconds, place) for pair in zip(workplaces, parts, strict=True)]
    failed = [pid for pid in pids if os.waitpid(pid, 0)[1] != 0]
    if failed:
        raise SystemExit("a worker failed; its error is above")
    return [result for pid in pids for result in pickle.loads((place / f"results-{pid}").read_bytes())]


def attempt(workplace: Workplace, module: Module, mutant: Mutant, seconds: float) -> Result:
    """Plant one mutant and run its tests: first the module's mirror, then the others of the package."""
    outcome = Outcome(PASSED, 0.0)
    with workplace.planted(mutant):
        for tests in filter(None, (module.mirror, module.others)):
            outcome = wait(workplace.start(tests), seconds)
            if outcome.noticed:
                break
    return Result(module, mutant, outcome.noticed, outcome.status is None)


def _seconds(workplace: Workplace, modules: Sequence[Module], package: str) -> float:
    """Return the seconds that a mutant's tests may take. Raises SystemExit if they fail without a mutant."""
    chosen = [module for module in modules if module.package == package]
    tests = tuple(dict.fromkeys(file for module in chosen for file in (*module.mirror, *module.others)))
    outcome = wait(workplace.start(tests, keep_bytecode=True), 900.0)
    if outcome.status != PASSED:
        raise SystemExit(f"{package}: tests fail or find nothing without a mutant:\n{workplace.output()}")
    print(f"{package}: {len(chosen)} modules, {len(tests)} files of tests, {outcome.seconds:.0f} s", flush=True)
    return PATIENCE + SLOWER * outcome.seconds


def _fork(workplace: Workplace, tasks: list[tuple[Module, Mutant]], seconds: dict[str, float], place: Path) -> int:
    """Start a process that attempts the tasks one after the other; return its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        parent_death_signal(signal.SIGKILL)()
        results = [_told(attempt(workplace, *task, seconds[task[0].package])) for task in tasks]
        (place / f"results-{os.getpid()}").write_bytes(pickle.dumps(results))
        status = 0
    except Exception:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _told(result: Result) -> Result:
    if not result.noticed:
        print(f"survives: {result.mutant.described}", flush=True)
    return result
