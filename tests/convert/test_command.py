"""The command line of the converter: every subcommand, its exit statuses and its refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from respec_trainer.convert.command import main
from respec_trainer.drafter.format import load_drafter, save_drafter
from tests.support.drafters import DRAFT_IDS, target_config, tiny_drafter
from tests.support.models import tiny_config
from tests.support.saved_models import random_state, read_all, same, save_checkpoint, save_hf


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_there_and_back_and_compared(tmp_path, capsys):
    source, _ = save_hf(tmp_path / "hf", dtype=torch.bfloat16)
    assert run("to-megatron", "--hf", source, "--out", tmp_path / "megatron", "--tp", 4) == 0
    assert run("reshard", "--checkpoint", tmp_path / "megatron", "--tp", 2) == 0
    assert run("to-hf", "--checkpoint", tmp_path / "tp2_megatron", "--out", tmp_path / "back") == 0
    assert same(read_all(source), read_all(tmp_path / "back"))
    capsys.readouterr()
    assert run("verify", tmp_path / "megatron", tmp_path / "back", "--tokens", 4) == 0
    printed = capsys.readouterr().out
    assert "logits of 2 x 4 tokens: largest difference 0 " in printed
    assert printed.splitlines()[-1] == "EQUAL"


def test_a_difference_gives_status_one(tmp_path, capsys):
    (first, _), (second, _) = (save_hf(tmp_path / name, shards=1) for name in ("first", "second"))
    weights = load_file(second / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, second / "model.safetensors")
    assert run("verify", first, second, "--tokens", 0) == 1
    printed = capsys.readouterr().out
    assert "model.norm.weight" in printed
    assert printed.splitlines()[-1] == "NOT EQUAL"
    assert run("verify", first, second, "--tolerance", 0.011) == 0


def test_a_drafter_out_of_a_checkpoint(tmp_path, capsys):
    target = target_config("qwen3")
    source, config = save_hf(tmp_path / "hf", "qwen3")
    config = type(config).from_dict(target.to_dict())
    config.save_pretrained(source)
    state = random_state(config)
    folder = tmp_path / "step_40"
    save_drafter(tiny_drafter(target), DRAFT_IDS, folder / "drafter", torch.float32)
    save_checkpoint(folder, source, config, state)
    assert run("drafter", "--checkpoint", folder, "--out", tmp_path / "drafter") == 0
    drafter, _ = load_drafter(tmp_path / "drafter", target, dtype=None)
    assert drafter.fc.weight.dtype == torch.bfloat16
    assert run("verify", tmp_path / "drafter", folder / "drafter", "--tolerance", 0.01) == 0
    weights = folder / "drafter" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    assert run("drafter", "--checkpoint", folder, "--out", tmp_path / "other") == 2
    assert "drafter/model.safetensors is corrupted" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_inspection(tmp_path, capsys):
    source, config = save_hf(tmp_path / "hf")
    folder = save_checkpoint(tmp_path / "step_40", source, config, random_state(config))
    assert run("inspect", source) == 0
    printed = capsys.readouterr().out
    assert "Qwen2ForCausalLM: 1 layers of 64, 4 / 2 heads, vocabulary 131" in printed
    assert "float32" in printed
    assert run("inspect", folder, "--checksums") == 0
    printed = capsys.readouterr().out
    assert "tensor parallel 2, data parallel 3, ZeRO 2" in printed
    assert "master, exp_avg, exp_avg_sq" in printed
    assert "every file is as it was saved" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "3"], "does not divide the model's 4 attention heads"),
        (["--tp", "0"], "--tp must be 1 or more"),
        (["--dtype", "int4"], "--dtype must be bf16 or fp32"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, capsys, arguments, message):
    source, _ = save_hf(tmp_path / "hf")
    assert run("to-megatron", "--hf", source, "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_another_tp_that_does_not_divide_is_refused(tmp_path, capsys):
    source, config = save_hf(tmp_path / "hf")
    folder = save_checkpoint(tmp_path / "step_40", source, config, random_state(config))
    assert run("reshard", "--checkpoint", folder, "--tp", 3) == 2
    assert "does not divide" in capsys.readouterr().err


def test_an_unknown_architecture_is_refused(tmp_path, capsys):
    source, _ = save_hf(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "mamba9"}
    (source / "config.json").write_text(json.dumps(config))
    assert run("to-megatron", "--hf", source, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert "hf/config.json: model_type 'mamba9' is not supported; use one of qwen2, qwen3, llama" in printed
    (source / "config.json").unlink()
    assert run("verify", source, source) == 2
    assert "config.json cannot be read" in capsys.readouterr().err


def test_a_checkpoint_without_a_drafter_has_none_to_give(tmp_path, capsys):
    source, config = save_hf(tmp_path / "hf")
    folder = save_checkpoint(tmp_path / "step_40", source, config, random_state(config))
    assert run("drafter", "--checkpoint", folder, "--out", tmp_path / "out") == 2
    assert "holds no drafter" in capsys.readouterr().err


def test_a_feature_that_the_actor_lacks_is_refused(tmp_path, capsys):
    source, _ = save_hf(tmp_path / "hf")
    tiny_config("qwen2", layers=1, hidden_act="gelu").save_pretrained(source)
    assert run("to-megatron", "--hf", source, "--out", tmp_path / "out") == 2
    assert "hidden_act 'gelu'" in capsys.readouterr().err
