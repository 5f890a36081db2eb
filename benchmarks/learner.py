"""Test the drafter's learner: how much accept length it keeps while the policy changes, by loss and weighting.

    python benchmarks/learner.py drift --steps 100 --seeds 3 --runs runs/drift --out drift.json
    OMP_NUM_THREADS=2 python benchmarks/learner.py variants --actor runs/drift/seed-0/actor --out variants.json

`drift` trains under the deepspeed launcher, so the actor and drafter must exist (`make drafter`). Each run trains its
drafter, and measures the trained and the initial drafter on the same responses (`drafter.compare_frozen`): two separate
runs would end with two policies, which are not equally easy to draft for. The KL divergence of the final policy from
the initial one is measured afterwards, on responses drawn with transformers. The runs stay in --runs; complete ones are
not run again. Start it in the repository's root, because paths of the configuration are relative.

`variants` draws responses of a trained policy and trains the same drafter on the same responses with each loss and
weighting, with the learner's own updates; no engine is used.
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
    moving = commands.add_parser("drift", help="frozen and learning drafter on the responses of a policy that changes")
    moving.add_argument("--steps", type=int, default=100)
    moving.add_argument("--lr", type=float, help="learning rate of the actor; default: the configuration's")
    moving.add_argument("--ranks", type=int, default=2)
    moving.add_argument(
        "--port", type=int, default=29500, help="where the ranks meet; change it if another run uses it"
    )
    moving.add_argument("--runs", type=Path, default=REPOSITORY / "runs/drift", help="folder of the runs")
    moving.add_argument(
        "--responses", type=int, default=256, help="number of responses to measure the KL divergence on"
    )
    offline = commands.add_parser("variants", help="losses and weightings at equal samples")
    offline.add_argument("--actor", type=Path, required=True, help="Hugging Face folder of a trained policy")
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
    """Return one run's numbers; train it unless it is complete."""
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
    """Return True if the folder has this run, from its first step to its export, and False if there is no folder.

    Ends the program if the folder has a run of another configuration or an incomplete one.
    """
    if not folder.exists():
        return False
    made = folder / "config.yaml"
    if not made.is_file() or made.read_text() != dump_config(config):
        raise SystemExit(f"{folder} is of another configuration: delete it, or choose other --runs")
    if len(read_metrics(folder)) < config.run.steps or not (folder / "actor/config.json").is_file():
        raise SystemExit(f"{folder} is a run that did not end: delete it to run it again")
    return True


def moved(config, actor: Path, responses: int) -> tuple[float, float]:
    """Return the KL of the trained actor from the initial one, in nats a response, and its standard error."""
    from policies import Policy, response_kl

    sampling = config.rollout.sampling
    end, start = Policy(actor, sampling), Policy(config.model.path, sampling)
    return response_kl(end, start, end.draw(end.prompts(config, seed=0, count=responses), seed=0))


def numbers(steps: Sequence[dict]) -> dict:
    """Compute a run's figures from its metrics. Shares and speeds are ratios of sums over all steps."""
    first, last = reward_rise(steps)
    measured = [step for step in steps if FROZEN in step]  # the first step has no responses to measure on
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
    """Return the means over the first few values and over the last few."""
    count = max(1, min(END_STEPS, len(values) // 2))
    return fmean(values[:count]), fmean(values[-count:])


def print_table(rows: Sequence[dict]) -> None:
    """Print rows with equal keys as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    main()
