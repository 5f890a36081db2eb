"""The whole job, as users start it: `deepspeed --num_gpus 2 launch/train.py ...`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from respec_trainer.actor.loading import load_hf_config
from respec_trainer.drafter.format import load_drafter
from respec_trainer.network import free_port
from respec_trainer.speculation.simulation.trace import load_trace
from respec_trainer.telemetry.recorder import read_metrics
from tests.support.data import GSM8K
from tests.support.tiny_runs import wait_for

REPOSITORY = Path(__file__).parents[2]
METRICS = {
    "reward": "mean std solve_rate",
    "rollout": "tokens tokens_per_second response_length truncated",
    "spec": "accept_length steps off_fraction accept_by_depth",
    "policy": "loss kl entropy grad_norm clip_fraction refused",
    "mismatch": "kl ratio_max ratio_min above_1.1 above_1.5 above_2 clipped",
    "engine": "restarts lost_tokens resumed_tokens",
    "audit": "p_value p_value_run total_variation power mean_ratio tokens",
    "time": "generate reward infer audit train learn resync wake step",
}


def start(small_actor, small_drafter, folder, *overrides: str, **popen) -> subprocess.Popen:
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", "2", "--master_port", str(free_port()), str(REPOSITORY / "launch/train.py")]
    command += ["--config", str(REPOSITORY / "configs/quickstart.yaml"), f"model.path={small_actor}"]
    command += [f"drafter.path={small_drafter}", f"run.dir={folder}", "run.name=test", "run.device=cpu", *overrides]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **popen
    )


@pytest.mark.skipif(not (GSM8K / "train.jsonl").is_file(), reason=f"no GSM8K at {GSM8K}; set RESPEC_DATA")
def test_two_iterations_on_gsm8k(small_actor, small_drafter, tmp_path):
    prompts = tmp_path / "gsm8k.jsonl"
    with (GSM8K / "train.jsonl").open() as file:
        prompts.write_text("".join(islice(file, 64)))
    shape = ["data.prompts_per_step=32", "rollout.samples_per_prompt=2", "rollout.sampling.max_new_tokens=24"]
    # This untrained actor solves nothing, so no reward changes it; weight decay does.
    moving = ["actor.optim.weight_decay=10", "actor.optim.lr=0.01"]
    room = ["data.max_prompt_tokens=400", "rollout.engine.max_total_tokens=null", "run.steps=2"]
    options = [*shape, *room, *moving, f"data.path={prompts}", "rollout.audit_every=1"]
    process = start(small_actor, small_drafter, tmp_path, *options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "leaked" not in output and "Traceback" not in output, output
    steps = read_metrics(tmp_path / "test")
    assert len(steps) == 2
    wanted = [f"{group}/{name}" for group, names in METRICS.items() for name in names.split()]
    for step in steps:
        assert {name for name in wanted if name not in step} == set()
        assert step["rollout/tokens"] > 64 and step["spec/off_fraction"] == 0.0
        assert step["policy/refused"] == 0 and step["audit/tokens"] == step["rollout/tokens"]
        assert step["audit/p_value"] > 1e-3 and 0 <= step["audit/power"] <= 1
        assert step["audit/mean_ratio"] == pytest.approx(1)
    samples = [json.loads(line) for line in (tmp_path / "test/samples.jsonl").read_text().splitlines()]
    assert {s["actor_version"] for s in samples} == {"actor-0", "actor-1"}
    assert "summary" in output and str(tmp_path / "test") in output
    assert "<html" in (tmp_path / "test/report.html").read_text()
    trace = load_trace(tmp_path / "test/lengths/step_2.jsonl")
    assert len(trace) == 64 and trace.tokens == steps[1]["rollout/tokens"]
    check_export(tmp_path / "test/actor", small_actor)


def check_export(folder: Path, source: Path) -> None:
    """transformers loads the exported actor, and training has changed it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained, before = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, source))
    assert set(trained) == set(before)
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    question = "How many apples are left?"
    trained, before = (AutoTokenizer.from_pretrained(f)(question) for f in (folder, source))
    assert trained == before


@pytest.mark.long
def test_ctrl_c_ends_every_process_and_the_run_goes_on_where_it_was(small_actor, small_drafter, tmp_path):
    options = [f"data.path={small_actor}/data/train.jsonl", "checkpoint.every=1", "data.prompts_per_step=8"]
    options += ["drafter.weighting=uniform", "drafter.mode=sync", "drafter.lr=0.001", "drafter.batch_size=32"]
    options += ["rollout.samples_per_prompt=4", "rollout.sampling.max_new_tokens=32"]
    process = start(small_actor, small_drafter, tmp_path, *options, "run.steps=1000", start_new_session=True)
    try:
        wait_for(tmp_path / "test/checkpoints/latest", process)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(family) >= 5, "launcher, its node launcher, two ranks and the engine's scheduler"
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # like a terminal
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, f"still running {time.monotonic() - began:.0f} s after Ctrl-C: {alive}"
    finally:
        for survivor in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            survivor.kill()
        process.kill()
    done = len(read_metrics(tmp_path / "test"))
    assert done, "what was recorded stays"
    steps = done + 1
    process = start(small_actor, small_drafter, tmp_path, *options, f"run.steps={steps}", "checkpoint.keep=1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "resumed after step" in output and not (tmp_path / "test-2").exists()
    assert [step["step"] for step in read_metrics(tmp_path / "test")] == list(range(steps))
    assert [path.name for path in (tmp_path / "test/checkpoints").glob("step_*")] == [f"step_{steps}"]
    check_exported_drafter(tmp_path / "test/drafter", tmp_path / f"test/checkpoints/step_{steps}", small_drafter)


def check_exported_drafter(folder: Path, checkpoint: Path, source: Path) -> None:
    """The exported drafter is the learner's, in the engines' dtype, and not the initial one."""
    config = load_hf_config(checkpoint / "hf")
    exported, learner_s, before = (
        load_drafter(place, config, torch.float32)[0].state_dict() for place in (folder, checkpoint / "drafter", source)
    )
    assert all(torch.equal(tensor, learner_s[name]) for name, tensor in exported.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in exported.items())
