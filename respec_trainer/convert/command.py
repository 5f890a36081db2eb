"""The command respec-convert (and tools/convert_checkpoint.py): converts, compares and describes models."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from respec_trainer.errors import ConfigError, RespecError

DESCRIPTION = """Convert models between Hugging Face folders and checkpoints, compare them, and describe them.

    respec-convert to-megatron --hf Qwen2.5-3B --out converted --tp 2
    respec-convert to-hf --checkpoint runs/NAME/checkpoints/step_40 --out my_model --dtype bf16
    respec-convert reshard --checkpoint runs/NAME/checkpoints/step_40 --tp 4
    respec-convert drafter --checkpoint runs/NAME/checkpoints/step_40 --out my_drafter
    respec-convert verify my_model runs/NAME/checkpoints/step_40 --tolerance 0.01
    respec-convert inspect runs/NAME/checkpoints/step_40

Tensors are read and written one by one. The output is complete or absent, and never replaces files. Exit status 0:
done, or equal; 1: not equal; 2: an error, and nothing was written.
"""
DTYPE_HELP = "bf16 or fp32"


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        return args.run(args)
    except RespecError as error:
        print(f"respec-convert: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="respec-convert", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    one = command("to-megatron", to_megatron, "a Hugging Face folder as a checkpoint")
    one.add_argument("--hf", type=Path, required=True, help="the Hugging Face folder")
    one.add_argument("--out", type=Path, required=True, help="the checkpoint to make")
    one.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default 1)")
    one.add_argument("--dtype", help=f"{DTYPE_HELP} (default: the weights' own)")
    one = command("to-hf", to_hf, "a checkpoint as a Hugging Face folder")
    _from_checkpoint(one, "the Hugging Face folder to make")
    one.add_argument("--dtype", help=f"{DTYPE_HELP} (default: the model's)")
    one.add_argument("--shard-gb", type=float, default=4.0, help="largest size of a file (default 4)")
    one = command("reshard", reshard, "a checkpoint for another number of tensor-parallel ranks")
    one.add_argument("--checkpoint", type=Path, required=True)
    one.add_argument("--tp", type=int, required=True, help="tensor-parallel ranks")
    one.add_argument("--out", type=Path, help="the checkpoint to make (default: tpN_NAME beside it)")
    one = command("drafter", drafter, "a checkpoint's drafter as a folder that SGLang loads")
    _from_checkpoint(one, "the drafter's folder to make")
    one.add_argument("--dtype", default="bf16", help=f"{DTYPE_HELP} (default bf16)")
    one = command("verify", verify, "check that two folders, of either kind, hold the same model")
    one.add_argument("first", type=Path)
    one.add_argument("second", type=Path)
    one.add_argument("--tolerance", type=float, default=0.0, help="largest difference allowed (default 0: every bit)")
    one.add_argument(
        "--tokens", type=int, default=16, help="compare logits of 2 rows of so many tokens (default 16; 0: do not)"
    )
    one = command("inspect", inspect, "describe the content of a folder")
    one.add_argument("folder", type=Path)
    one.add_argument("--checksums", action="store_true", help="also read every file of a checkpoint and check it")
    return whole


def _from_checkpoint(command: argparse.ArgumentParser, out: str) -> None:
    command.add_argument("--checkpoint", type=Path, required=True, help="such as runs/NAME/checkpoints/step_40")
    command.add_argument("--out", type=Path, required=True, help=out)


def to_megatron(args: argparse.Namespace) -> int:
    from respec_trainer.checkpoint.progress import Bar
    from respec_trainer.convert.convert import to_megatron as convert

    hf_config = read_config(args.hf, args.tp)
    with Bar() as bar:
        convert(args.hf, hf_config, args.out, args.tp, args.dtype and parse_dtype(args.dtype), bar)
    print(args.out)
    return 0


def to_hf(args: argparse.Namespace) -> int:
    from respec_trainer.checkpoint.progress import Bar
    from respec_trainer.convert.convert import checkpoint_to_hf

    checkpoint, hf_config = open_checkpoint(args.checkpoint)
    dtype = parse_dtype(args.dtype) if args.dtype else checkpoint.dtype
    with Bar() as bar:
        checkpoint_to_hf(checkpoint, hf_config, args.out, dtype, bar, int(args.shard_gb * 2**30))
    print(args.out)
    return 0


def reshard(args: argparse.Namespace) -> int:
    from respec_trainer.checkpoint.progress import Bar
    from respec_trainer.convert.convert import reshard as convert

    checkpoint, hf_config = open_checkpoint(args.checkpoint, args.tp)
    # Not step_N: a run treats every folder of such a name among its checkpoints as its own.
    out = args.out or args.checkpoint.with_name(f"tp{args.tp}_{args.checkpoint.resolve().name}")
    with Bar() as bar:
        convert(checkpoint, hf_config, out, args.tp, bar)
    print(out)
    return 0


def drafter(args: argparse.Namespace) -> int:
    from respec_trainer.checkpoint.progress import Bar
    from respec_trainer.convert.convert import copy_drafter
    from respec_trainer.drafter.format import check_drafter_folder

    checkpoint, hf_config = open_checkpoint(args.checkpoint)
    source = args.checkpoint / "drafter"
    if not source.is_dir():
        raise ConfigError(f"{args.checkpoint} holds no drafter: its run trained without one")
    with Bar() as bar:
        checkpoint.check_digests(bar, "drafter/")
        check_drafter_folder(source, hf_config)
        copy_drafter(source, args.out, parse_dtype(args.dtype), bar)
    print(args.out)
    return 0


def verify(args: argparse.Namespace) -> int:
    from rich.console import Console

    from respec_trainer.checkpoint.progress import Bar
    from respec_trainer.checkpoint.tensors import open_tensors
    from respec_trainer.convert.report import comparison_report, logits_line
    from respec_trainer.convert.verify import compare_folders, logits_of, sample_tokens

    configs = [None if _is_drafter(folder) else config_of(folder) for folder in (args.first, args.second)]
    tied = all(config is not None and config.tie_word_embeddings for config in configs)
    console = Console(width=140)
    with open_tensors(args.first, configs[0]) as first, open_tensors(args.second, configs[1]) as second:
        with Bar() as bar:
            comparison = compare_folders(first, second, bar, tied)
        console.print(comparison_report(comparison, args.tolerance))
        equal = comparison.within(args.tolerance)
        if args.tokens and None not in configs:
            tokens = sample_tokens(configs[0], args.tokens)
            pairs = zip((first, second), configs, strict=True)
            logits = [logits_of(tensors, config, tokens) for tensors, config in pairs]
            line, close = logits_line(*logits, args.tolerance)
            console.print(line)
            equal = equal and close
    console.print("EQUAL" if equal else "NOT EQUAL")
    return 0 if equal else 1


def inspect(args: argparse.Namespace) -> int:
    from rich.console import Console

    from respec_trainer.checkpoint.megatron_folder import MegatronFolder
    from respec_trainer.checkpoint.progress import Bar
    from respec_trainer.convert.inspect import describe
    from respec_trainer.convert.report import facts_table

    facts = describe(args.folder)
    if args.checksums:
        with Bar() as bar:
            MegatronFolder(args.folder).check_digests(bar)
        facts["checksums"] = "every file is as it was saved"
    Console(width=140).print(facts_table(facts))
    return 0


def open_checkpoint(folder: Path, tp: int = 1):
    """Open the checkpoint in `folder`. Return it and its Hugging Face config; checks that `tp` ranks can divide it."""
    from respec_trainer.checkpoint.megatron_folder import MegatronFolder

    return MegatronFolder(folder), read_config(folder / "hf", tp)


def config_of(folder: Path):
    """Return the Hugging Face config of a checkpoint or a Hugging Face folder."""
    from respec_trainer.checkpoint.meta import is_checkpoint

    return read_config(folder / "hf" if is_checkpoint(folder) else folder)


def read_config(folder: Path, tp: int = 1):
    """Return the Hugging Face config in `folder`. Raises ConfigError for a model or `tp` that is not supported."""
    from respec_trainer.actor.check import check_model
    from respec_trainer.actor.loading import load_hf_config
    from respec_trainer.models.registry import family_named

    family_named(_config_json(folder).get("model_type"), str(folder / "config.json"))
    if tp < 1:
        raise ConfigError(f"--tp must be 1 or more, not {tp}")
    hf_config = load_hf_config(folder)
    check_model(hf_config, tp)
    return hf_config


def _config_json(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; a model's folder needs one") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} does not hold a JSON object; copy it again")
    return config


def _is_drafter(folder: Path) -> bool:
    from respec_trainer.models.llama import EAGLE3_DRAFTER

    config = folder / "config.json"
    return config.is_file() and _config_json(folder).get("architectures") == [EAGLE3_DRAFTER]


def parse_dtype(name: str):
    """Return the torch.dtype of a name in the trainer's configuration. Raises ConfigError for any other name."""
    from respec_trainer.dtypes import DTYPES

    if name not in DTYPES:
        raise ConfigError(f"--dtype must be {' or '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]
