"""rollout/sglang/arguments.py: translation of the configuration to sglang's arguments."""

from __future__ import annotations

import pytest

from respec_trainer.config import EngineConfig, SpeculationConfig
from respec_trainer.rollout.sglang import arguments as translation
from respec_trainer.rollout.sglang.arguments import server_arguments
from respec_trainer.rollout.sglang.settings import EngineSettings
from tests.support.configs import smallest_config

SPECULATIVE = ("speculation.algorithm=eagle3", "drafter.path=drafter")


def test_settings_have_the_configuration_s_values(tmp_path):
    config = smallest_config(tmp_path, *SPECULATIVE, "model.dtype=fp32", "run.seed=7", "rollout.sampling.stop=['\\n']")
    settings = EngineSettings.from_config(config, "cpu", index=2)
    assert (settings.model_path, settings.drafter_path, settings.dtype) == ("actor", "drafter", "fp32")
    assert settings.seed == 9, "engines of one run must not draw alike"
    assert settings.speculative and settings.tokenizer and not settings.seeded


def test_without_speculation_the_drafter_is_left_out(tmp_path):
    config = smallest_config(tmp_path, "drafter.path=drafter")
    settings = EngineSettings.from_config(config, "cpu")
    assert settings.drafter_path is None and not settings.speculative and not settings.tokenizer
    assert not [name for name in server_arguments(settings) if name.startswith("speculative")]


def test_the_cpu_pool_holds_a_full_batch_of_the_longest_samples(tmp_path):
    lengths = ("data.max_prompt_tokens=100", "rollout.sampling.max_new_tokens=50")
    config = smallest_config(tmp_path, *SPECULATIVE, *lengths, "rollout.engine.max_running_requests=8")
    arguments = server_arguments(EngineSettings.from_config(config, "cpu"))
    prompts = config.data.prompts_per_step * 100
    assert 8 * (100 + 50) < arguments["max_total_tokens"] - prompts < 8 * (100 + 50 + 16)
    config = smallest_config(tmp_path, "rollout.engine.max_total_tokens=999")
    assert server_arguments(EngineSettings.from_config(config, "cpu"))["max_total_tokens"] == 999
    on_gpu = EngineSettings.from_config(smallest_config(tmp_path), "cuda")
    assert server_arguments(on_gpu)["max_total_tokens"] is None, "on a GPU it fills its share of the memory"


def test_each_engine_has_a_port_of_its_own(monkeypatch):
    ports = iter((15001, 15002))
    monkeypatch.setattr(translation, "free_port", lambda: next(ports))
    assert [server_arguments(EngineSettings("actor"))["nccl_port"] for _ in range(2)] == [15001, 15002]


@pytest.mark.parametrize(("device", "tp"), [("cpu", 1), ("cuda", 2)])
def test_arguments(device, tp):
    settings = EngineSettings(
        "actor",
        "drafter",
        device=device,
        engine=EngineConfig(
            tp=tp, max_running_requests=5, min_free_slots=2, timeout=9.0, log_level="info", mem_fraction=0.4
        ),
        speculation=SpeculationConfig(steps=2, topk=3, draft_tokens=6),
        base_gpu_id=4,
        seed=3,
    )
    arguments = server_arguments(settings)
    assert {
        "model_path": "actor",
        "dtype": "bfloat16",
        "device": device,
        "tp_size": tp,
        "base_gpu_id": 4,
        "random_seed": 3,
        "max_running_requests": 5,
        "min_free_slots_delay": 2,
        "mem_fraction_static": 0.4,
        "log_level": "info",
        "watchdog_timeout": 9.0,
        "skip_tokenizer_init": True,
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": "drafter",
        "speculative_num_steps": 2,
        "speculative_eagle_topk": 3,
        "speculative_num_draft_tokens": 6,
        "speculative_accept_threshold_single": 1.0,
        "speculative_accept_threshold_acc": 1.0,
        "disable_radix_cache": False,
    }.items() <= arguments.items()
    backends = {arguments["speculative_draft_attention_backend"], arguments.get("decode_attention_backend", "triton")}
    assert backends == ({"intel_amx"} if device == "cpu" else {"triton"})
    assert arguments.get("enable_memory_saver", False) == (device == "cuda")


@pytest.mark.parametrize("algorithm", ["standalone", "ngram"])
def test_arguments_of_other_algorithms(tmp_path, algorithm):
    path = ["drafter.path=small"] if algorithm == "standalone" else []
    shape = ["speculation.topk=3", "speculation.draft_tokens=7", "rollout.sampling.seeded=true"]
    config = smallest_config(tmp_path, f"speculation.algorithm={algorithm}", *path, *shape)
    settings = EngineSettings.from_config(config, "cpu")
    arguments = server_arguments(settings)
    assert settings.seeded and arguments["speculative_num_draft_tokens"] == 7
    if algorithm == "standalone":
        assert (arguments["speculative_algorithm"], arguments["speculative_draft_model_path"]) == (
            "STANDALONE",
            "small",
        )
        assert (arguments["speculative_num_steps"], arguments["speculative_eagle_topk"]) == (3, 3)
    else:
        assert arguments["speculative_algorithm"] == "NGRAM" and arguments["speculative_ngram_max_bfs_breadth"] == 3
        assert not {"speculative_draft_model_path", "speculative_num_steps"} & set(arguments)


def test_lossy_settings_reach_sglang_and_are_off_by_default():
    def given(**changes):
        arguments = server_arguments(EngineSettings("actor", "drafter", speculation=SpeculationConfig(**changes)))
        names = ("accept_threshold_single", "accept_threshold_acc", "use_rejection_sampling")
        return [arguments[f"speculative_{name}"] for name in names]

    assert given() == [1.0, 1.0, False]
    lossy = {"accept_threshold_single": 0.4, "accept_threshold_acc": 0.5, "allow_lossy": True}
    assert given(**lossy) == [0.4, 0.5, False]
    assert given(rejection_sampling=True) == [1.0, 1.0, True]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sglang_accepts_every_argument(device):
    from respec_trainer.rollout.sglang.workers import prepare_process

    prepare_process("cpu")
    from sglang.srt.server_args import ServerArgs

    for algorithm in ("eagle3", "standalone", "ngram"):
        shape = SpeculationConfig(algorithm=algorithm, steps=3, topk=1, draft_tokens=4)
        arguments = server_arguments(EngineSettings("actor", "drafter", device=device, speculation=shape))
        assert set(arguments) <= set(ServerArgs.__struct_fields__)
