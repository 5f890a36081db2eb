"""convert/inspect.py: what is said of a checkpoint and of a Hugging Face folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from respec_trainer.checkpoint.meta import sealed
from respec_trainer.convert.inspect import describe
from respec_trainer.errors import ConfigError
from tests.support.saved_models import random_state, save_checkpoint, save_hf

MODEL = "Qwen2ForCausalLM: 1 layers of 64, 4 / 2 heads, vocabulary 131"


def test_a_checkpoint_is_described_from_its_meta(tmp_path):
    source, config = save_hf(tmp_path / "hf")
    folder = save_checkpoint(tmp_path / "step_40", source, config, random_state(config))
    facts = describe(folder)
    sizes = [path.stat().st_size for path in (folder / "actor").iterdir()]
    assert facts.pop("actor").startswith(f"master, exp_avg, exp_avg_sq of 10 parameters in {len(sizes)} files, ")
    written = facts.pop("written by")
    assert written.startswith("respec_trainer ") and f"torch {torch.__version__}" in written
    everything = [path for path in folder.rglob("*") if path.is_file() and path.name != "meta.json"]
    assert facts.pop("all files").startswith(f"{len(everything)} files, ")
    assert facts == {
        "format": "checkpoint, format 2",
        "step": "40",
        "model": MODEL,
        "layout": "tensor parallel 2, data parallel 3, ZeRO 2",
        "dtype": "bf16",
        "drafter": "no",
    }
    meta = json.loads((folder / "meta.json").read_text())
    fewer = {key: value for key, value in meta.items() if key not in ("step", "zero", "versions")}
    (folder / "meta.json").write_text(sealed(fewer))
    facts = describe(folder)
    assert (facts["step"], facts["written by"]) == ("0", "")
    assert facts["layout"] == "tensor parallel 2, data parallel 3, ZeRO 0"


def test_a_drafter_in_a_checkpoint_is_told(tmp_path):
    source, config = save_hf(tmp_path / "hf")
    (tmp_path / "step_40/drafter").mkdir(parents=True)
    (tmp_path / "step_40/drafter/config.json").write_text("{}")
    folder = save_checkpoint(tmp_path / "step_40", source, config, random_state(config), tp=1, dp=1)
    facts = describe(folder)
    assert facts["drafter"] == "yes" and "10 parameters in 1 file, " in facts["actor"]


def test_a_hugging_face_folder_is_described_from_its_files(tmp_path):
    source, config = save_hf(tmp_path / "hf", tied=True, dtype=torch.bfloat16, shards=1)
    held = load_file(source / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"].float()
    save_file(held, source / "model.safetensors")
    facts = describe(source)
    numbers = sum(tensor.numel() for tensor in held.values())
    assert facts.pop("files").startswith("1 file, ")
    assert facts == {
        "format": "Hugging Face folder",
        "model": f"{MODEL}, tied embeddings",
        "weights": f"{numbers:,} in {len(held)} tensors",
        "dtype": f"bfloat16 ({len(held) - 1} tensors), float32 (1 tensors)",
    }
    (source / "config.json").write_text('{"model_type": "qwen2"}')
    assert describe(source)["model"].startswith("qwen2: None layers of None")
    (source / "config.json").unlink()
    assert describe(source)["model"] == "no config.json"


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither model.safetensors nor"):
        describe(tmp_path)
