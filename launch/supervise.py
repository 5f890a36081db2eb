"""Start a run, and start it again from its last checkpoint when a rank, an engine or a host has failed.

    python launch/supervise.py -- deepspeed --num_gpus 8 launch/train.py --config my.yaml
    python launch/supervise.py --max_restarts 5 --window 86400 -- deepspeed --hostfile hosts launch/train.py ...

The run must save checkpoints (checkpoint.every) and resume from them (checkpoint.resume=auto, the default). See
docs/failures.md.
"""

from __future__ import annotations

import argparse
import sys

from respec_trainer.supervise import RestartLimits, Supervisor


def main() -> int:
    defaults = RestartLimits()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s [options] -- COMMAND [ARGUMENT ...]"
    )
    parser.add_argument("--max_restarts", type=_count, default=defaults.max_restarts, help="within --window seconds")
    parser.add_argument("--window", type=_seconds, default=defaults.window, help="seconds")
    parser.add_argument("--backoff", type=_seconds, default=defaults.backoff, help="seconds before the first restart")
    parser.add_argument(
        "--grace", type=_seconds, default=defaults.grace, help="seconds for the command to end by itself"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="the command that starts the run, after --")
    args = parser.parse_args()
    limits = RestartLimits(
        args.max_restarts, args.window, args.backoff, max(defaults.most_backoff, args.backoff), args.grace
    )
    try:
        code = Supervisor(args.command, limits).run()
    except OSError as error:
        parser.error(f"{args.command[0]} cannot be started: {error}")
    return code if code >= 0 else 128 - code


def _count(text: str) -> int:
    return _at_least_zero(int(text))


def _seconds(text: str) -> float:
    return _at_least_zero(float(text))


def _at_least_zero(value):
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
