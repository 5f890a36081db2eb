"""Train a policy with speculative rollouts. What the deepspeed launcher starts, once a rank.

    deepspeed --num_gpus 2 launch/train.py --config configs/quickstart.yaml
    deepspeed launch/train.py --config my.yaml run.steps=100 actor.optim.lr=2e-6
    python launch/train.py --check --config configs/qwen2.5-7b.yaml --nodes 2 --gpus_per_node 8

Everything that can be wrong with the configuration is said before any process group is made. `--check` trains nothing:
it shows which rank would do what where, estimates the memory it takes, and lists every problem; docs/launch.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from functools import partial

from respec_trainer.config import Config
from respec_trainer.config_file import load_config
from respec_trainer.errors import ConfigError, RespecError
from respec_trainer.launchers import adopt_place
from respec_trainer.processes import collect_garbage_again, collect_no_garbage, free_all_garbage

# The launcher ends all ranks as soon as one ends: the others wait this long, so that the first can say what is wrong.
OTHERS_WAIT_SECONDS = 20.0


def main() -> int:
    _settle_process()
    args = _arguments()
    rank, world = 0, 1
    try:
        adopt_place(os.environ)
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        config = load_config(args.config, args.overrides)
        if args.check:
            return _plan(config, args, rank)
        _check(config, world, rank)
    except ConfigError as error:
        return _refuse(error, rank)
    status = _train(config, rank, world)
    free_all_garbage()
    return status


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the configuration")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("--check", action="store_true", help="show the plan and every problem, without training")
    asked = parser.add_argument_group("what --check plans for; default: what the launcher started, or this machine")
    asked.add_argument("--nodes", type=int, metavar="N")
    asked.add_argument("--gpus_per_node", type=int, metavar="G")
    asked.add_argument("--gpu_memory_gb", type=float, metavar="GB", help="default: this machine's, else 80")
    asked.add_argument("--model_config", metavar="JSON", help="a config.json to plan with before model and data exist")
    # Intermixed: overrides may stand anywhere among the options.
    args = parser.parse_intermixed_args()
    names = ("nodes", "gpus_per_node", "gpu_memory_gb", "model_config")
    given = [name for name in names if getattr(args, name) is not None]
    if given and not args.check:
        parser.error(f"--{given[0]} is for --check")
    if any(getattr(args, name) <= 0 for name in given if name != "model_config"):
        parser.error("--nodes, --gpus_per_node and --gpu_memory_gb must be positive")
    return args


def _settle_process() -> None:
    """Settings that must stand before torch is imported, which happens once the configuration has been read."""
    collect_no_garbage()
    # Ranks share the machine's cores, and the engine has processes of its own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Notices of libraries about hardware and other ranks that are not there; what matters here is raised.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    logging.getLogger("sglang").setLevel(logging.ERROR)


def _plan(config: Config, args: argparse.Namespace, rank: int) -> int:
    """Print the plan; of the ranks that a launcher started only the first."""
    if rank != 0:
        return 0
    from respec_trainer.compat import prepare

    prepare(config.run.device)
    from respec_trainer.preflight.show_plan import Question, check

    return check(config, Question(args.nodes, args.gpus_per_node, args.gpu_memory_gb, args.model_config))


def _check(config: Config, world: int, rank: int) -> None:
    from respec_trainer.compat import prepare

    prepare(config.run.device)
    from respec_trainer.preflight.checks import preflight

    preflight(config, world, rank)


def _train(config: Config, rank: int, world: int) -> int:
    from respec_trainer.interrupt import end_on_signal, end_process
    from respec_trainer.job import Job
    from respec_trainer.placement import Placement
    from respec_trainer.rollout.remote.host import host_engine
    from respec_trainer.rollout.remote.link import LinkLostError
    from respec_trainer.trainer import Trainer
    from respec_trainer.watchdog import Watchdog

    placement = Placement.of(config, world)
    try:
        watchdog = Watchdog(config.run, rank, world, placement.trainers)
    except ConfigError as error:
        return _refuse(error, rank)
    end_on_signal(watchdog.signalled)
    try:
        watchdog.start()
        if not placement.trains(rank):
            collect_garbage_again()
            host_engine(config, rank, world)
            watchdog.stop()
            return 0
        job = Job(config, watchdog)
        collect_garbage_again()
        Trainer(job).run()
        job.finish()
        watchdog.stop()
        job.close()
    except BaseException as error:
        watchdog.fail(error, partial(_tell, error), lost=isinstance(error, LinkLostError))
        # Not sys.exit: leaving in order would wait in the process groups for ranks that are stuck or gone.
        end_process(2 if isinstance(error, ConfigError) else 1)
    return 0


def _refuse(error: RespecError, rank: int) -> int:
    if rank != 0:
        time.sleep(OTHERS_WAIT_SECONDS)
    _tell(error)
    return 2


def _tell(error: BaseException) -> None:
    if isinstance(error, RespecError):
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


if __name__ == "__main__":
    sys.exit(main())
