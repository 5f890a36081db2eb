"""Test that the rollout engine samples from the actor's distribution, with and without speculation.

    python tools/audit_rollout.py --config configs/quickstart.yaml
    python tools/audit_rollout.py --config my.yaml --cells "EAGLE-3 chain" --json audit.json model.path=runs/x/actor

Draws responses from the real engine in every mode, and tests the joint distribution of their tokens against the
actor's, which is computed exactly in float32. Prints PASS or FAIL at the end; the exit status is 1 for FAIL.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--cells", default="", help="only cells whose name contains this")
    parser.add_argument("--short", action="store_true", help="three cells only, in a minute")
    parser.add_argument("--control", action="store_true", help="audit a lossy engine, which must FAIL")
    parser.add_argument(
        "--total-variation",
        type=float,
        default=0.02,
        help="draw until a distribution that moves this mass where the actor is uncertain would be detected (0.02)",
    )
    parser.add_argument("--draws", type=int, help="least responses drawn for a cell")
    parser.add_argument("--limit", type=int, default=40_000, help="most responses drawn for a cell")
    parser.add_argument("--json", type=Path, help="also write the outcome here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    from respec_trainer.errors import RespecError

    try:
        return audit(args)
    except RespecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def audit(args: argparse.Namespace) -> int:
    from rich.console import Console

    from respec_trainer.audit.prepare import prepare_audit, wanted_cells
    from respec_trainer.audit.report import Standard, judge, table

    console, standard, began = Console(width=140), Standard(total_variation=args.total_variation), time.perf_counter()
    config = prepare_audit(args.config, args.overrides)
    cells, modes = wanted_cells(config, args.cells, args.short, args.control)
    from respec_trainer.audit.auditor import Auditor
    from respec_trainer.audit.draws import ROUND

    auditor = Auditor(
        config, standard, args.draws or ROUND, args.limit, notify=lambda text: console.print(f"[dim]{text}[/]")
    )
    results = []
    for result in auditor.run(cells, modes):
        results.append(result)
        console.print(f"  p = {min(result.p_values):.3g} over {result.tokens:,} tokens in {result.seconds:.0f} s")
    verdicts = judge(results, standard)
    console.print(table(verdicts, standard))
    passed = all(verdict.passed for verdict in verdicts)
    console.print(f"{'PASS' if passed else 'FAIL'}: {len(cells)} cells in {time.perf_counter() - began:.0f} s")
    if args.json:
        temporary = args.json.with_name(f".{args.json.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"passed": passed, "cells": [v.row() for v in verdicts]}, indent=2))
        temporary.rename(args.json)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
