"""The command line of launch/train.py: its options, the settings of a rank's process, and the printing of errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

from respec_trainer.errors import RespecError
from respec_trainer.processes import collect_no_garbage

# The launcher ends all ranks as soon as one ends. The other ranks wait this long, so that rank 0 can print its error.
OTHERS_WAIT_SECONDS = 20.0

# Read when torch is imported. Ranks share the machine's cores, and the engine has processes of its own. The log level
# hides notices about missing hardware and other ranks; real problems are raised as errors.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def read_arguments(description: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read options and overrides from `words`; None: the arguments of this process.

    Prints the problem and exits with status 2 if an argument is invalid, or is for --check and --check is not given.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the configuration")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("--check", action="store_true", help="show the plan and every problem, without training")
    asked = _add_options_of_check(parser)
    args = parser.parse_intermixed_args(words)  # overrides may stand anywhere among the options
    given = [name for name in asked if getattr(args, name) is not None]
    if given and not args.check:
        parser.error(f"--{given[0]} is for --check")
    if any(getattr(args, name) <= 0 for name in given if name != "model_config"):
        parser.error("--nodes, --gpus_per_node and --gpu_memory_gb must be positive")
    return args


def _add_options_of_check(parser: argparse.ArgumentParser) -> list[str]:
    """Add the options that only --check reads; return their names."""
    group = parser.add_argument_group("the machines --check plans for; default: those of the launcher, or this one")
    options = [
        group.add_argument("--nodes", type=int, metavar="N"),
        group.add_argument("--gpus_per_node", type=int, metavar="G"),
        group.add_argument(
            "--gpu_memory_gb", type=float, metavar="GB", help="default: this machine's, or 80 without a GPU"
        ),
        group.add_argument(
            "--model_config", metavar="JSON", help="a config.json to plan with before model and data exist"
        ),
    ]
    return [option.dest for option in options]


def settle_process() -> None:
    """Apply the settings that must come before torch is imported; variables that the user has set stay as they are."""
    collect_no_garbage()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    logging.getLogger("sglang").setLevel(logging.ERROR)


def refuse(error: RespecError, rank: int) -> int:
    """Print the error, on rank 0 at once and on the others later. Return 2, the exit status for this."""
    if rank != 0:
        time.sleep(OTHERS_WAIT_SECONDS)
    print_error(error)
    return 2


def print_error(error: BaseException) -> None:
    """Print an error that this package raises on purpose as one message, and any other error with its traceback."""
    if isinstance(error, RespecError):
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
