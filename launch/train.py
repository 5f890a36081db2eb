"""Train a policy with speculative rollouts. What the deepspeed launcher starts, once a rank.

    deepspeed --num_gpus 2 launch/train.py --config configs/quickstart.yaml
    deepspeed launch/train.py --config my.yaml run.steps=100 actor.optim.lr=2e-6

Everything that can be wrong with the configuration is said before any process group is made.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
import warnings

from respec_trainer.config import Config, load_config
from respec_trainer.errors import ConfigError, RespecError

# The launcher ends all ranks as soon as one ends: the others wait this long, so that the first can say what is wrong.
OTHERS_WAIT_SECONDS = 20.0


def main() -> int:
    _settle_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the configuration")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher's
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config = load_config(args.config, args.overrides)
        config.check_world(world)
        _check(config, world, rank)
    except ConfigError as error:
        return _refuse(error, rank)
    return _train(config, rank)


def _settle_process() -> None:
    """Settings that must stand before torch is imported, which happens once the configuration has been read."""
    # Ranks share the machine's cores, and the engine has processes of its own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Notices of libraries about hardware that is not there; what matters here is raised.
    warnings.filterwarnings("ignore")
    logging.getLogger("sglang").setLevel(logging.ERROR)


def _check(config: Config, world: int, rank: int) -> None:
    from respec_trainer.compat import prepare

    prepare(config.run.device)
    from respec_trainer.preflight import preflight

    preflight(config, world, rank)


def _train(config: Config, rank: int) -> int:
    from respec_trainer.interrupt import end_children, end_on_signal
    from respec_trainer.job import Job
    from respec_trainer.trainer import Trainer

    end_on_signal()
    try:
        job = Job(config)
        Trainer(job).run()
        job.finish()
        job.close()
    except BaseException as error:
        _refuse(error, rank) if isinstance(error, RespecError) else traceback.print_exc()
        end_children()
        # Not sys.exit: leaving in order would wait in the process groups for ranks that are stuck or gone.
        os._exit(1)
    return 0


def _refuse(error: RespecError, rank: int) -> int:
    if rank != 0:
        time.sleep(OTHERS_WAIT_SECONDS)
    print(f"\nerror: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
