"""Fixtures: a tiny actor's folder, and preflight of the smallest configuration with it."""

from __future__ import annotations

import json

import pytest

from respec_trainer.preflight.checks import preflight
from tests.support.configs import smallest_config
from tests.support.models import save_tiny_model, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("actor"), tiny_config("qwen3"))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def check(actor, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    folders = [f"model.path={actor}", f"data.path={data}"]

    def check(*overrides, world=1):
        preflight(smallest_config(tmp_path, *folders, *overrides), world, rank=0)

    check.folder, check.folders, check.actor = tmp_path, folders, actor
    return check
