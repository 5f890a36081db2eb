"""Measure decoding on a GPU by batch size, plain and with EAGLE-3 chains, with real model shapes and dummy weights.

    python benchmarks/throughput.py --model qwen2.5-7b --batches 1 4 16 64 --steps 3 --accept 2.5 --out throughput.json

One engine with dummy weights decodes every batch with 0 and with each of `--steps` drafts, in turns, `--rounds` times.
Acceptance is simulated: every pass keeps `--accept` tokens on average, with the bonus token, so the result is the cost
of drafting and verifying. The report has medians over rounds: tokens a second, and the ratio to plain decoding in the
same round. Plain decoding is measured in the same engine, which holds the drafter in memory but does not run it. With
--device cpu and --model small it runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

MODELS = Path(__file__).parents[1] / "configs/models"
SMALL = "small"  # four layers, to try this script
PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=[SMALL, *(path.stem for path in sorted(MODELS.glob("*.json")))], default="qwen2.5-7b"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[3])
    parser.add_argument("--accept", type=float, default=2.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a sequence")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--mem-fraction", type=float, default=0.7)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_folders(Path(folder), args.model)
        engine, steps = start(Path(folder), args)
        try:
            results = measure(engine, steps, args)
        finally:
            engine.shutdown()
    if args.out:
        args.out.write_text(json.dumps({"arguments": {**vars(args), "out": None}, "results": results}, indent=1))


def make_folders(root: Path, model: str) -> None:
    """Make the folders target/ and drafter/, each with only a config.json."""
    from respec_trainer.compat.torchvision_cpu import define_torchvision_operators

    define_torchvision_operators()
    from respec_trainer.drafter.format import drafter_config
    from respec_trainer.drafter.shape import DrafterShape
    from respec_trainer.plan.sizes import DRAFT_VOCABULARY

    config = shape_of(model)
    config.bos_token_id, config.eos_token_id = 1, 2
    config.save_pretrained(root / "target")
    drafter = drafter_config(DrafterShape.for_target(config, min(DRAFT_VOCABULARY, config.vocab_size)))
    (root / "drafter").mkdir()
    (root / "drafter/config.json").write_text(json.dumps(drafter))


def shape_of(model: str):
    """Return the Hugging Face config of a file in MODELS, or of SMALL."""
    from transformers import Qwen2Config

    from respec_trainer.preflight.checks import read_model_config

    if model != SMALL:
        return read_model_config(MODELS / f"{model}.json")
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024, "max_position_embeddings": 4096}
    return Qwen2Config(architectures=["Qwen2ForCausalLM"], **heads, **sizes)


def start(root: Path, args: argparse.Namespace):
    """Start the engine with all numbers of draft steps and simulated acceptance; return it and its DepthSettings."""
    from respec_trainer.config import EngineConfig, SpeculationConfig
    from respec_trainer.rollout.decode_log import DepthSettings
    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import EngineSettings

    most, room = max(args.batches), PROMPT_TOKENS + args.tokens + 16
    candidates = tuple(sorted({0, *args.steps}))
    steps = DepthSettings(
        "fixed", candidates, max_batch=most, max_context=room, fixed=0, simulated_accept_length=args.accept
    )
    engine = SGLangEngine(
        EngineSettings(
            str(root / "target"),
            str(root / "drafter"),
            device=args.device,
            load_format="dummy",
            speculation=SpeculationConfig(steps=steps.most, topk=1, draft_tokens=steps.most + 1),
            engine=EngineConfig(
                max_running_requests=most, max_total_tokens=2 * most * room, mem_fraction=args.mem_fraction
            ),
            steps=steps,
        )
    )
    engine.start()
    return engine, steps


def measure(engine, steps, args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Return the results by batch, then by draft steps."""
    results = {}
    for batch in args.batches:
        speeds: dict[int, list[float]] = {number: [] for number in steps.candidates}
        accepted: dict[int, float] = {}
        for turn in range(args.rounds + 1):
            for number in steps.candidates:
                engine.set_steps(replace(steps, fixed=number, seed=turn))
                speed, accepted[number] = generate(engine, batch, args.tokens, turn)
                if turn:  # the first round warms up
                    speeds[number].append(speed)
        results[str(batch)] = {
            str(number): {
                "tokens_per_second": median(values),
                "accept_length": accepted[number],
                "speedup": median(own / plain for own, plain in zip(values, speeds[0], strict=True)),
            }
            for number, values in speeds.items()
        }
        print(f"batch {batch:3d}", json.dumps(results[str(batch)]), flush=True)
    return results


def generate(engine, batch: int, tokens: int, seed: int) -> tuple[float, float]:
    """Generate for one batch of random prompts; return (tokens a second, accept length)."""
    from respec_trainer.rollout.sample import Request, SamplingParams

    sampling = SamplingParams(tokens, temperature=1.0, ignore_eos=True)
    asked = [tuple(3 + (7 * i + 11 * j + 13 * seed) % 500 for j in range(PROMPT_TOKENS)) for i in range(batch)]
    began = time.perf_counter()
    samples = engine.submit([Request(str(i), prompt, sampling) for i, prompt in enumerate(asked)]).collect()
    seconds = time.perf_counter() - began
    return batch * tokens / seconds, sum(sample.accept_length for sample in samples) / batch


if __name__ == "__main__":
    main()
