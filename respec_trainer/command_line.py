"""The command line of launch/train.py: its options, the settings of a rank's process, and errors told to the user."""

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

# The launcher ends all ranks as soon as one ends: the others wait this long, so that the first can say what is wrong.
OTHERS_WAIT_SECONDS = 20.0

# Read when torch is imported. Ranks share the machine's cores, and the engine has processes of its own. The log level
# keeps out notices about hardware and other ranks that are not there; what matters is raised.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def read_arguments(description: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options and overrides among `words`, by default those of this process.

    Prints what is wrong and exits with status 2 where they cannot be read, or ask something of --check without it.
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
    """Add the options that only --check reads; their names."""
    group = parser.add_argument_group("what --check plans for; default: what the launcher started, or this machine")
    options = [
        group.add_argument("--nodes", type=int, metavar="N"),
        group.add_argument("--gpus_per_node", type=int, metavar="G"),
        group.add_argument("--gpu_memory_gb", type=float, metavar="GB", help="default: this machine's, else 80"),
        group.add_argument(
            "--model_config", metavar="JSON", help="a config.json to plan with before model and data exist"
        ),
    ]
    return [option.dest for option in options]


def settle_process() -> None:
    """Set what must stand before torch is imported; what the user has set in the environment stays."""
    collect_no_garbage()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    logging.getLogger("sglang").setLevel(logging.ERROR)


def refuse(error: RespecError, rank: int) -> int:
    """Tell the error, rank 0 at once and the others later; the exit status of a run that cannot start, 2."""
    if rank != 0:
        time.sleep(OTHERS_WAIT_SECONDS)
    tell(error)
    return 2


def tell(error: BaseException) -> None:
    """Print an error that this package raises on purpose as one message, any other with its traceback."""
    if isinstance(error, RespecError):
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
