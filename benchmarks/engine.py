"""Compare decoding speed without a GPU: the engine, plain and with EAGLE-3, against transformers' generate.

    python benchmarks/engine.py --batches 1 8 32 64 --rounds 5 --out engine.json

Every arm keeps its model loaded in a process of its own with one thread. The arms take turns, with one generation each
in a round, so a machine that slows down slows all of them. The report has the median of each arm's tokens a second, and
the median over rounds of its ratio to transformers in the same round. The drafter's weights are random; `--accept` sets
the accept length that sglang simulates, with the bonus token.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from models import SHAPES, make_drafter, make_target

ARMS = ("transformers", "plain", "eagle3")
PROMPT_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a sequence")
    parser.add_argument("--accept", type=float, default=3.0)
    parser.add_argument("--model", choices=SHAPES, default="mid")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_target(Path(folder) / "target", SHAPES[args.model])
        make_drafter(Path(folder) / "drafter", SHAPES[args.model])
        arms = {name: Arm(name, folder, args) for name in args.arms}
        results = {batch: measure(arms, batch, args) for batch in args.batches}
        for arm in arms.values():
            arm.close()
    if args.out:
        args.out.write_text(json.dumps({"arguments": {**vars(args), "out": None}, "results": results}, indent=2))


def measure(arms: dict[str, Arm], batch: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the tokens a second of each arm at one batch size, and their ratios to transformers."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    accept = {}
    for number in range(args.rounds + 1):
        for name, arm in arms.items():
            took, accept[name] = arm.generate(batch)
            if number:  # the first round warms up
                seconds[name].append(took)
    row = {}
    for name, taken in seconds.items():
        row[name] = {"tokens_per_second": batch * args.tokens / median(taken), "accept_length": accept[name]}
        if "transformers" in arms:
            pairs = zip(seconds["transformers"], taken, strict=True)
            row[name]["ratio"] = median(reference / own for reference, own in pairs)
        values = "  ".join(f"{key} {value:.2f}" for key, value in row[name].items())
        print(f"batch {batch:3d}  {name:12s}  {values}", flush=True)
    return row


class Arm:
    """A process that generates on request."""

    def __init__(self, name: str, folder: str, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, folder, args, theirs))
        self.process.start()
        self.pipe.recv()  # ready

    def generate(self, batch: int) -> tuple[float, float]:
        """Generate `batch` sequences; return the seconds and the accept length."""
        self.pipe.send(batch)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def serve(name: str, folder: str, args: argparse.Namespace, pipe) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if name == "eagle3":
        os.environ["SGLANG_SIMULATE_ACC_LEN"] = str(args.accept)
    generate, close = (setup_transformers if name == "transformers" else setup_engine)(name, Path(folder), args)
    pipe.send("ready")
    while (batch := pipe.recv()) is not None:
        began = time.perf_counter()
        accept = generate([[3 + (7 * i + 11 * j) % 500 for j in range(PROMPT_TOKENS)] for i in range(batch)])
        pipe.send((time.perf_counter() - began, accept))
    close()


def setup_transformers(_name: str, folder: Path, args: argparse.Namespace):
    import torch

    from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
    from respec_trainer.dtypes import DTYPES

    define_torchvision_operators()
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    dtype = DTYPES[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=dtype).eval()

    how = {"do_sample": True, "temperature": args.temperature, "top_k": 0} if args.temperature else {"do_sample": False}

    def generate(prompts: list[list[int]]) -> float:
        exactly = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "eos_token_id": None}
        with torch.no_grad():
            model.generate(torch.tensor(prompts), pad_token_id=0, **exactly, **how)
        return 1.0

    return generate, lambda: None


def setup_engine(name: str, folder: Path, args: argparse.Namespace):
    from respec_trainer.config import EngineConfig, SpeculationConfig
    from respec_trainer.rollout.sample import Request, SamplingParams
    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import EngineSettings

    algorithm = "eagle3" if name == "eagle3" else "none"
    engine = SGLangEngine(
        EngineSettings(
            str(folder / "target"),
            drafter_path=str(folder / "drafter"),
            dtype=args.dtype,
            engine=EngineConfig(max_total_tokens=64 * (PROMPT_TOKENS + args.tokens + 16)),
            speculation=SpeculationConfig(algorithm=algorithm, steps=3, topk=1, draft_tokens=4),
        )
    )
    engine.start()
    sampling = SamplingParams(max_new_tokens=args.tokens, temperature=args.temperature, ignore_eos=True)

    def generate(prompts: list[list[int]]) -> float:
        requests = [Request(str(i), tuple(prompt), sampling) for i, prompt in enumerate(prompts)]
        samples = engine.submit(requests).collect()
        return sum(sample.accept_length for sample in samples) / len(samples)

    return generate, engine.shutdown


if __name__ == "__main__":
    main()
