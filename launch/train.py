"""Train a policy with speculative rollouts. The deepspeed launcher starts this script once for each rank.

    deepspeed --num_gpus 2 launch/train.py --config configs/quickstart.yaml
    deepspeed launch/train.py --config my.yaml run.steps=100 actor.optim.lr=2e-6
    python launch/train.py --check --config configs/qwen2.5-7b.yaml --nodes 2 --gpus_per_node 8

Errors in the configuration are reported before any process group is made. `--check` trains nothing: it shows the
work of each rank and host, estimates the memory, and lists every problem; see docs/launch.md.
"""

import os
import sys
from functools import partial

from respec_trainer.command_line import print_error, read_arguments, refuse, settle_process
from respec_trainer.compat import prepare
from respec_trainer.config_file import load_config
from respec_trainer.errors import ConfigError
from respec_trainer.launchers import adopt_place
from respec_trainer.processes import collect_garbage_again, free_all_garbage


def main() -> int:
    settle_process()
    args = read_arguments(__doc__.splitlines()[0])
    rank, world = 0, 1
    try:
        rank, world = adopt_place(os.environ)
        config = load_config(args.config, args.overrides)
        prepare(config.run.device)
        if args.check:
            from respec_trainer.preflight.show_plan import Question, check

            asked = Question(args.nodes, args.gpus_per_node, args.gpu_memory_gb, args.model_config)
            return check(config, asked) if rank == 0 else 0
        from respec_trainer.preflight.checks import preflight

        preflight(config, world, rank)
        status = train(config, rank, world)
    except ConfigError as error:
        return refuse(error, rank)
    free_all_garbage()
    return status


def train(config, rank: int, world: int) -> int:
    from respec_trainer.interrupt import end_on_signal, end_process
    from respec_trainer.job import Job
    from respec_trainer.placement import Placement
    from respec_trainer.rollout.remote.host import host_engine
    from respec_trainer.rollout.remote.link import LinkLostError
    from respec_trainer.trainer import Trainer
    from respec_trainer.watchdog import Watchdog

    placement = Placement.of(config, world)
    watchdog = Watchdog(config.run, rank, world, placement.trainers)
    end_on_signal(watchdog.signalled)
    try:
        watchdog.start()
        if placement.trains(rank):
            job = Job(config, watchdog)
            collect_garbage_again()
            Trainer(job).run()
            job.finish()
            watchdog.stop()
            job.close()
        else:
            collect_garbage_again()
            host_engine(config, rank, world)
            watchdog.stop()
    except BaseException as error:
        watchdog.fail(error, partial(print_error, error), lost=isinstance(error, LinkLostError))
        # Not sys.exit: a normal exit would wait in the process groups for ranks that are stuck or gone.
        end_process(2 if isinstance(error, ConfigError) else 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
