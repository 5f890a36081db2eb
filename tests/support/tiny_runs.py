"""The inputs of a whole run, made in a second: a random actor with its tokenizer, and prompts."""

from __future__ import annotations

import gc
import json
import subprocess
import time
from pathlib import Path

from tests.support.models import save_tiny_model, tiny_config, tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
# In float32 with seeded draws, the configuration determines a run. The actor solves nothing: weight decay changes it.
SMALL = [
    "model.dtype=fp32", "run.device=cpu", "run.name=test", "speculation.algorithm=none", "drafter.path=null",
    "telemetry.trackers=[jsonl]", "telemetry.live='off'", "checkpoint.export_at_end=false", "data.template='{prompt}'",
    "data.prompts_per_step=4", "rollout.samples_per_prompt=2", "rollout.sampling.max_new_tokens=8",
    "rollout.sampling.seeded=true", "rollout.engine.max_total_tokens=4096", "actor.optim.weight_decay=10",
    "actor.optim.lr=0.01",
]  # fmt: skip


def save_prompts(folder: Path) -> Path:
    """Write a file of 32 short questions with their answers to `folder`."""
    data = folder / "prompts.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(32)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return data


def tiny_run(folder: Path) -> list[str]:
    """Make actor and prompts in `folder`; return the arguments of launch/train.py for a short run with them."""
    actor = folder / "tiny_actor"
    save_tiny_model(actor, tiny_config("qwen3"))
    tiny_tokenizer().save_pretrained(actor)
    own = [f"model.path={actor}", f"data.path={save_prompts(folder)}", f"run.dir={folder / 'runs'}"]
    return ["--config", str(REPOSITORY / "configs/quickstart.yaml"), *SMALL, *own]


def train(config, watchdog=None) -> None:
    """Run one rank as launch/train.py does, in a process that continues afterwards. `watchdog` must run already."""
    from respec_trainer.compat import prepare

    prepare("cpu")
    from respec_trainer.job import Job
    from respec_trainer.trainer import Trainer

    job = Job(config, watchdog)
    Trainer(job).run()
    if watchdog:
        watchdog.stop()
    job.actor.engine.destroy()
    job.close()
    del job
    gc.collect()  # so that nothing of this run is left for the process's next run


def numbers(steps: list[dict]) -> list[dict]:
    """Return the metrics without those that are measured in seconds."""
    return [{k: v for k, v in step.items() if not k.startswith("time/") and "per_second" not in k} for step in steps]


def wait_for(file: Path, process: subprocess.Popen, seconds: float = 180) -> None:
    """Wait until a run that writes to a pipe has made `file`. Fails with its output if it ends first."""
    deadline = time.monotonic() + seconds
    while not file.is_file():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no {file.name} within {seconds:.0f} s"
        time.sleep(0.1)
