"""Plant mutants in the pure modules and count those that the tests notice: `make mutation ARGS="speculation audit"`.

Without packages all of modules.toml are taken. Of each module at most --most mutants are planted, drawn by --seed.
Prints each survivor when it is found, and a table of scores at the end. Exit status 1 if a score is below --at-least.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from respec_trainer.processes import free_all_garbage
from tests.mutation.runs import Result, run
from tests.mutation.table import modules
from tests.mutation.workplace import import_heavy

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutation", description=__doc__)
    parser.add_argument("packages", nargs="*", help="names of tables in tests/mutation/modules.toml; default: all")
    parser.add_argument("--most", type=int, default=12, help="most mutants a module (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="draws other mutants (default 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--module", help="only modules whose path contains this text")
    parser.add_argument("--at-least", type=float, default=0.9, help="lowest score allowed (default 0.9)")
    args = parser.parse_args()
    chosen = [module for module in modules(ROOT, args.packages) if (args.module or "") in module.path]
    import_heavy()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        results = run(ROOT, chosen, args.most, args.seed, args.workers, Path(folder))
    free_all_garbage()
    return report(results, args.at_least)


def report(results: list[Result], at_least: float) -> int:
    """Print the scores; return the exit status."""
    planted = Counter(result.module.package for result in results)
    noticed = Counter(result.module.package for result in results if result.noticed)
    print("\n| package | mutants | noticed | score |\n|---|---|---|---|")
    for package, count in planted.items():
        print(f"| {package} | {count} | {noticed[package]} | {noticed[package] / count:.0%} |")
    below = [package for package, count in planted.items() if noticed[package] < at_least * count]
    if below:
        print(f"below {at_least:.0%}: {', '.join(below)}")
    return int(bool(below))


if __name__ == "__main__":
    raise SystemExit(main())
