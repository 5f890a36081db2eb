"""The drafter's learner: does accept length last while the policy moves, and which loss and weighting do it best.

    python benchmarks/learner.py drift --steps 100 --seeds 3 --runs runs/drift --out drift.json
    OMP_NUM_THREADS=2 python benchmarks/learner.py variants --actor runs/drift/seed-0/actor --out variants.json

`drift` trains under the deepspeed launcher, so the actor and drafter must exist (`make drafter`). Its runs learn, and
measure the drafter that they began with on the very responses that they measure the learning one on
(`drafter.compare_frozen`): two runs, one with each, would end as two policies, which are not equally easy to draft
for. The policy's way from where it started is measured afterwards, on responses drawn with transformers. Runs stay in
--runs, and those that are there and complete are not run again. Start it from the repository's root, as paths of the
configuration are relative.

`variants` draws responses of a policy that has moved and trains the same drafter on the same of them by each loss and
weighting, with the learner's own updates; no engine takes part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from respec_trainer.config_file import dump_config, load_config
from respec_trainer.telemetry.recorder import read_metrics
from respec_trainer.telemetry.summary import END_STEPS, reward_rise

REPOSITORY = Path(__file__).parents[1]
LEARNS = ["drafter.weighting=reward", "drafter.compare_frozen=true"]
ENGINE, FROZEN = "drafter/measured_accept_length", "drafter/frozen_accept_length"
COLUMNS = ("seed", "accept_start", "online_end", "frozen_end", "online_kept", "frozen_kept", "kl", "entropy_start")
COLUMNS += ("entropy_end", "reward_start", "reward_end", "exposed_share", "tokens_per_second", "step_s")


def main() -> None:
    args = parse()
    report = drift(args) if args.command == "drift" else variants(args)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    moving = commands.add_parser("drift", help="frozen and learning drafter on the responses of a policy that moves")
    moving.add_argument("--steps", type=int, default=100)
    moving.add_argument("--lr", type=float, help="of the actor; default: the configuration's")
    moving.add_argument("--ranks", type=int, default=2)
    moving.add_argument("--port", type=int, default=29500, help="where the ranks meet; another run may have taken it")
    moving.add_argument("--runs", type=Path, default=REPOSITORY / "runs/drift", help="folder of the runs")
    moving.add_argument("--responses", type=int, default=256, help="that the policy's way is measured on")
    offline = commands.add_parser("variants", help="losses and weightings at equal samples")
    offline.add_argument("--actor", type=Path, required=True, help="Hugging Face folder of a policy that has moved")
    offline.add_argument("--prompts", type=int, default=64, help="to learn from, each with a group of responses")
    offline.add_argument("--held-out", type=int, default=256, help="prompts to measure on, with one response each")
    offline.add_argument("--epochs", type=int, default=1)
    for command in (moving, offline):
        command.add_argument("--config", default=str(REPOSITORY / "configs/quickstart.yaml"))
        command.add_argument("--seeds", type=int, default=3)
        command.add_argument("--out", type=Path, help="write the numbers as JSON")
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_args()


def variants(args: argparse.Namespace) -> dict:
    from variants import compare

    report = compare(load_config(args.config, args.overrides), args)
    print_table(report["table"])
    return report


def drift(args: argparse.Namespace) -> dict:
    rows: list[dict] = []
    for seed in range(args.seeds):
        rows.append({"seed": seed, **run(args, seed)})
        print(json.dumps(rows[-1]), flush=True)
    print_table([{name: row[name] for name in COLUMNS} for row in rows])
    report = {name: fmean(row[name] for row in rows) for name in ("online_kept", "frozen_kept")}
    print(json.dumps(report))
    return report | {"runs": rows}


def run(args: argparse.Namespace, seed: int) -> dict:
    """One run's numbers; it is trained unless it is there."""
    name, runs = f"seed-{seed}", args.runs.resolve()
    settings = [f"run.dir={runs}", f"run.name={name}", f"run.seed={seed}", f"run.steps={args.steps}"]
    settings += [] if args.lr is None else [f"actor.optim.lr={args.lr}"]
    settings += ["checkpoint.export_at_end=true", *LEARNS, *args.overrides]
    folder, config = runs / name, load_config(args.config, settings)
    if not is_complete(folder, config):
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [str(launcher), "--num_gpus", str(args.ranks), "--master_port", str(args.port)]
        command += [str(REPOSITORY / "launch/train.py")]
        command += ["--config", args.config, *settings]
        status = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=REPOSITORY).returncode
        if status:
            raise SystemExit(f"run failed with status {status}: {' '.join(command)}")
    kl, error = moved(config, folder / "actor", args.responses)
    return {**numbers(read_metrics(folder)), "kl": kl, "kl_error": error}


def is_complete(folder: Path, config) -> bool:
    """Whether this very run is there, from its first step to its export. Ends the program if it is there otherwise."""
    if not folder.exists():
        return False
    made = folder / "config.yaml"
    if not made.is_file() or made.read_text() != dump_config(config):
        raise SystemExit(f"{folder} is of another configuration: delete it, or choose other --runs")
    if len(read_metrics(folder)) < config.run.steps or not (folder / "actor/config.json").is_file():
        raise SystemExit(f"{folder} is a run that did not end: delete it to run it again")
    return True


def moved(config, actor: Path, responses: int) -> tuple[float, float]:
    """KL of the trained actor from the one it started as, in nats a response, and its standard error."""
    from policies import Policy, response_kl

    sampling = config.rollout.sampling
    end, start = Policy(actor, sampling), Policy(config.model.path, sampling)
    return response_kl(end, start, end.draw(end.prompts(config, seed=0, count=responses), seed=0))


def numbers(steps: Sequence[dict]) -> dict:
    """A run's figures from its metrics. Shares and speeds are of sums over all steps."""
    first, last = reward_rise(steps)
    measured = [step for step in steps if FROZEN in step]  # the first has nothing to measure on
    start, online = ends([step[ENGINE] for step in measured])
    frozen = ends([step[FROZEN] for step in measured])[1]
    predicted = [step["drafter/predicted_accept_length"] / step[ENGINE] - 1 for step in measured]
    entropy_start, entropy_end = ends([step["policy/entropy"] for step in steps])
    tokens, generating, exposed, seconds = (
        sum(step.get(key, 0.0) for step in steps)
        for key in ("rollout/tokens", "time/generate", "time/learn_exposed", "time/step")
    )
    return {
        "accept_start": start,
        "online_end": online,
        "frozen_end": frozen,
        "online_kept": (online - 1) / (start - 1),
        "frozen_kept": (frozen - 1) / (start - 1),
        "prediction_error": max(map(abs, predicted)),
        "entropy_start": entropy_start,
        "entropy_end": entropy_end,
        "reward_start": first,
        "reward_end": last,
        "exposed_share": exposed / seconds,
        "tokens_per_second": tokens / generating,
        "step_s": seconds / len(steps),
        "steps": len(steps),
    }


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and over the last few."""
    count = max(1, min(END_STEPS, len(values) // 2))
    return fmean(values[:count]), fmean(values[-count:])


def print_table(rows: Sequence[dict]) -> None:
    """Rows of equal keys, as Markdown."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    main()
