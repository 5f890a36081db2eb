"""Measure the speed of checkpoint conversion against `cp` of the same bytes on the same disk, and its memory.

    OMP_NUM_THREADS=1 python benchmarks/convert.py --shape 3b --layers 22 --tp 2 --rounds 3 --out speed.json   # 4 GB
    OMP_NUM_THREADS=1 python benchmarks/convert.py --shape 7b --tp 2 --rounds 1 --no-cp --out memory.json      # 15 GB
    OMP_NUM_THREADS=1 python benchmarks/convert.py --shape 7b --layers 2 --tp 2 --reshard 4 --out reshard.json # 19 GB

Makes a Qwen2.5 of that shape with random weights, in files of 4 GB, and runs these arms in turn in every round:

    cp             cp -r of the folder, and fsync of every file, because a conversion ends with that too
    to_megatron    from the folder to a checkpoint for tp ranks
    to_hf          from that checkpoint to a Hugging Face folder: every file is read twice, first for its checksum

Before an arm starts, its input is dropped from the page cache. The report has seconds, an arm's share of cp's speed in
the same round (the median), and the peak of memory during the arm: `anonymous` is the process's own memory, `resident`
includes the pages of mapped files, which the kernel reclaims when it needs them. Needs three times the model's size on
the disk.

`--reshard TP` measures only resharding: from a checkpoint with float32 weights and AdamW's moments to one of TP ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from respec_trainer.checkpoint.fragments import KINDS
from respec_trainer.checkpoint.megatron_folder import MegatronFolder
from respec_trainer.checkpoint.new_folder import check_place, sync
from respec_trainer.checkpoint.progress import Silent
from respec_trainer.convert.convert import checkpoint_to_hf, reshard, to_megatron, write_hf, write_meta, write_shards
from respec_trainer.weights.hf_map import hf_model_shapes
from respec_trainer.weights.safetensors_io import Spec

SHAPES = {
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
DTYPE = torch.bfloat16
SAMPLE_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--layers", type=int, help="default: the shape's")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-cp", action="store_true", help="memory only")
    parser.add_argument("--reshard", type=int, metavar="TP", help="measure only resharding to TP ranks")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="respec-convert-") as folder:
        report = measure(args, Path(folder))
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    config = model_config(args.shape, args.layers)
    size = sum(Spec(DTYPE, shape).nbytes for shape in hf_model_shapes(config).values())
    dtype = torch.float32 if args.reshard else DTYPE
    if args.reshard:
        size *= len(KINDS) * dtype.itemsize // DTYPE.itemsize
        check_place(folder / "hf", 2 * size)
        rounds = [resharded(folder, config, args) for _ in range(args.rounds)]
    else:
        check_place(folder / "hf", 3 * size)
        make_model(folder / "hf", config)
        rounds = [one_round(folder, config, args) for _ in range(args.rounds)]
    largest = max(Spec(dtype, shape).nbytes for shape in hf_model_shapes(config).values())
    report = {"gigabytes": round(size / 1e9, 3), "tp": args.tp, "largest_tensor_gb": round(largest / 1e9, 3)}
    report["bound_gb"] = round(3 * largest / 1e9 + 1, 3)
    for arm in rounds[0]:
        taken = [entry[arm] for entry in rounds]
        report[arm] = {key: round(max(e[key] for e in taken), 3) for key in ("anonymous_gb", "resident_gb")}
        report[arm]["seconds"] = [round(entry["seconds"], 2) for entry in taken]
        if "cp" in rounds[0] and arm != "cp":
            shares = [entry["cp"]["seconds"] / entry[arm]["seconds"] for entry in rounds]
            report[arm]["share_of_cp_speed"] = round(median(shares), 3)
    return report


def one_round(folder: Path, config, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    source, checkpoint, back = folder / "hf", folder / "megatron", folder / "back"
    quiet, figures = Silent(), {}
    if not args.no_cp:
        figures["cp"] = arm(source, lambda: copy(source, back))
        shutil.rmtree(back)
    figures["to_megatron"] = arm(source, lambda: to_megatron(source, config, checkpoint, args.tp, None, quiet))
    figures["to_hf"] = arm(checkpoint, lambda: checkpoint_to_hf(MegatronFolder(checkpoint), config, back, DTYPE, quiet))
    shutil.rmtree(checkpoint)
    shutil.rmtree(back)
    print(figures, file=sys.stderr, flush=True)
    return figures


def resharded(folder: Path, config, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    source, out = folder / "trained", folder / "resharded"
    make_checkpoint(source, config, args.tp)
    figures = arm(source, lambda: reshard(MegatronFolder(source), config, out, args.reshard, Silent()))
    shutil.rmtree(source)
    shutil.rmtree(out)
    return {"reshard": figures}


def arm(reads: Path, run: Callable[[], None]) -> dict[str, float]:
    """Run one conversion; return its seconds and its peaks of memory in GB."""
    evict(reads)
    with memory_peak() as peak:
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
    return {"seconds": seconds} | {key: value / 1e6 for key, value in peak.items()}


def copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    sync(out)


def model_config(shape: str, layers: int | None):
    from transformers import Qwen2Config

    return Qwen2Config(**SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {}))


class RandomTensors:
    """Random weights of a model. Each is a slice of one block of noise and is made when it is read."""

    def __init__(self, folder: Path, config):
        self.folder, self.shapes = folder, hf_model_shapes(config)
        self.block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(DTYPE)

    def names(self):
        return self.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return DTYPE

    def read(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        size = torch.Size(self.shapes[name]).numel()
        start = hash(name) % 1000
        block = self.block.repeat((start + size) // len(self.block) + 1)
        return block[start : start + size].view(self.shapes[name])[index]


def make_model(folder: Path, config) -> None:
    folder.mkdir()
    config.save_pretrained(folder)
    write_hf(folder, RandomTensors(folder, config), DTYPE, Silent())
    sync(folder)


def make_checkpoint(folder: Path, config, tp: int) -> None:
    """Write a checkpoint as a run does: weights and moments in float32."""
    config.save_pretrained(folder / "hf")
    source = RandomTensors(folder, config)
    sources, dtypes = dict.fromkeys(KINDS, source), dict.fromkeys(KINDS, torch.float32)
    written = write_shards(folder, sources, dtypes, config, tp, Silent())
    meta = {"step": 0, "tp": tp, "dp": 1, "zero": 1, "dtype": "bf16", "optimizer": True, "model": config.to_dict()}
    write_meta(folder, meta, config, written)
    sync(folder)


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache; they must have been written to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


@contextmanager
def memory_peak() -> Iterator[dict[str, float]]:
    """Yield a dict that gets this process's peaks of anonymous and of all resident memory within the block, in kB."""
    peak = {"anonymous_gb": 0.0, "resident_gb": 0.0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            lines = Path("/proc/self/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            for key, name in (("anonymous_gb", "RssAnon"), ("resident_gb", "VmRSS")):
                peak[key] = max(peak[key], float(status[name].split()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
