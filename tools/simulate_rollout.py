"""Replay a rollout's response lengths under a policy of speculation, without an engine.

    python tools/simulate_rollout.py --profile profile.json --lengths trace.jsonl --policy adaptive
    python tools/simulate_rollout.py --profile profile.json --lengths trace.jsonl --policy s=3 --engines 8 --slots 32

Prints the duration of the rollout under the policy, under every fixed number of steps, and under three policies that
choose by the true costs, acceptance and remaining tokens at every moment: `greedy`, `weighted` and `critical`. Regret
is against the fastest of these. The costs are fitted to the profile, which must be of the hardware and models in
question. The format of the trace is described in respec_trainer/speculation/simulation/trace.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    args = parse()
    from respec_trainer.errors import RespecError

    try:
        return replay(args)
    except RespecError as error:
        print(f"simulate_rollout: {error}", file=sys.stderr)
        return 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True, help="profile of the costs, as JSON")
    parser.add_argument("--lengths", type=Path, required=True, help="length trace, as JSONL")
    parser.add_argument("--policy", default="adaptive", help="adaptive, s=K, s=K<=B (default adaptive)")
    parser.add_argument("--engines", type=int, default=1, help="engines that share the rollout (default 1)")
    parser.add_argument("--slots", type=int, default=64, help="sequences an engine runs at most (default 64)")
    parser.add_argument(
        "--min-free-slots", type=int, default=1, help="free slots before new requests start (default 1)"
    )
    parser.add_argument("--balance", choices=("shares", "queue"), default="shares", help="how engines get requests")
    parser.add_argument("--acceptance", help="by depth, for rows without their own: 0.8,0.7,0.6")
    parser.add_argument("--expected", action="store_true", help="every pass keeps the expected number of drafts")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of kept drafts (default 0)")
    parser.add_argument("--json", type=Path, help="also write the outcomes here")
    return parser.parse_args()


def replay(args: argparse.Namespace) -> int:
    from rich.console import Console

    from respec_trainer.speculation.profiling.fit import fit_costs
    from respec_trainer.speculation.profiling.profile import load_profile
    from respec_trainer.speculation.simulation.replay import (
        as_data,
        candidates_of,
        compare,
        parse_acceptance,
        render_outcomes,
    )
    from respec_trainer.speculation.simulation.simulator import Setting
    from respec_trainer.speculation.simulation.trace import load_trace

    setting = Setting(
        engines=args.engines,
        slots=args.slots,
        min_free_slots=args.min_free_slots,
        balance=args.balance,
        sampled=not args.expected,
        seed=args.seed,
    )
    profile = load_profile(args.profile)
    trace = load_trace(args.lengths, parse_acceptance(args.acceptance))
    outcomes = compare(trace, fit_costs(profile), candidates_of(profile), args.policy, setting)
    console = Console(width=120)
    console.print(f"{len(trace)} responses, {trace.tokens:,} tokens, {setting.engines} x {setting.slots} slots")
    console.print(render_outcomes(outcomes))
    if args.json:
        args.json.write_text(json.dumps(as_data(outcomes), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
