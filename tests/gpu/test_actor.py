"""The actor on NCCL: scores, updates and captured features, over ZeRO stages, tensor and data parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.models import prompts
from tests.gpu.place import DEVICE, FLOAT32, claim
from tests.support.actors import build_actor, make_batch, train, variant
from tests.support.models import save_tiny_model, tiny_config, tiny_model
from tests.support.processes.ranks import run_ranks
from tests.support.reference_actor import expectation, norm_error, weight_error

HERE = {"run.device": DEVICE}
# Float32 on both sides, but kernels add in different orders; CPUs differ by 3e-7. Attention kernels of a GPU may round
# more than float32 does, so a hundred times that is allowed.
WEIGHTS, NORMS, SCORES = 3e-5, 1e-4, 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("actor") / "qwen3", tiny_config("qwen3"))


@pytest.fixture(scope="module")
def expected(folder) -> dict:
    """Return the results of one process with plain AdamW, on the CPU."""
    return expectation(folder)


def on_host(value):
    """Return results with all tensors in host memory, because the parent process receives them."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return {key: on_host(each) for key, each in value.items()} if isinstance(value, dict) else value


def train_here(folder: Path, variants: list[dict]) -> list[dict]:
    claim()
    return [on_host(result) for result in train(folder, variants)]


def check(folder, expected, record, world_size: int, variants: list[dict]) -> None:
    """Compare all ranks' inference and updates with the reference; record the largest errors."""
    everyone = run_ranks(world_size, train_here, folder, [changes | HERE for changes in variants], timeout=200)
    found = [result for results in everyone for result in results]
    scores = max(
        float((result[name] - expected[name][result["rows"]]).abs().max())
        for result in found
        for name in ("old", "entropy")
    )
    weights = max(weight_error(result, expected) for result in found)
    norms = max(norm_error(result, expected) for result in found)
    record(scores=scores, weights=weights, grad_norms=norms)
    assert scores <= SCORES and weights <= WEIGHTS and norms <= NORMS


@pytest.mark.point(7)
def test_point_7_zero_1_2_and_3_train_as_one_process_does(folder, expected, record):
    check(folder, expected, record, 1, [variant(1, stage, 3) for stage in (1, 2, 3)])


@pytest.mark.gpus(2)
@pytest.mark.point(7)
def test_point_7_tensor_parallel_trains_as_one_process_does(folder, expected, record):
    split = {"actor.parallel.sequence_parallel": True}
    check(folder, expected, record, 2, [variant(2, 1, 3), variant(2, 3, 3, **split)])


@pytest.mark.gpus(2)
@pytest.mark.point(7)
def test_point_7_data_parallel_trains_as_one_process_does(folder, expected, record):
    check(folder, expected, record, 2, [variant(1, stage, 2) for stage in (1, 2, 3)])


@pytest.mark.gpus(4)
@pytest.mark.point(7)
def test_point_7_both_train_as_one_process_does(folder, expected, record):
    check(folder, expected, record, 4, [variant(2, stage, 2) for stage in (1, 3)])


def score_bf16(folder: Path) -> torch.Tensor:
    """Return the log-probs [B, S] of a bf16 actor."""
    from respec_trainer.actor.parallel import shutdown_parallel

    claim()
    actor = build_actor(folder, variant(1, 1, 8) | HERE | {"model.dtype": "bf16"})
    batch, _ = make_batch(actor.hf_config.vocab_size)
    logprobs = actor.infer(batch).logprobs.cpu()
    actor.engine.destroy()
    shutdown_parallel()
    return logprobs


def test_bf16_scores_are_transformers_to_rounding(folder, record):
    (logprobs,) = run_ranks(1, score_bf16, folder)
    config = tiny_config("qwen3")
    model = tiny_model(config).to(torch.bfloat16)
    batch, _ = make_batch(config.vocab_size)
    with torch.no_grad():
        scores = model(batch.tokens).logits.float().log_softmax(-1)
    expected = torch.nn.functional.pad(scores[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0], (1, 0))
    error = (logprobs - expected * batch.response_mask).abs().max()
    record(largest_error=float(error))
    # Logits are a few units, bf16 has 8 bits, and the two layers round in different orders.
    assert error <= 0.15


def capture(folder: Path, rows: list[tuple[int, ...]], layers: tuple[int, ...]) -> list[torch.Tensor]:
    """Return the features [L, 3H] of each row that the actor captures, in float32."""
    claim()
    from respec_trainer.actor.parallel import shutdown_parallel
    from respec_trainer.capture import Wanted
    from respec_trainer.rollout.batch import collate
    from respec_trainer.rollout.sample import Sample

    actor = build_actor(folder, variant(1, 1, 8) | HERE)
    samples = [Sample(str(i), list(row[:-1]), [row[-1]], [-1.0], "length", "a", "d") for i, row in enumerate(rows)]
    captured = actor.infer(collate(samples, pad_id=0), Wanted(layers, torch.arange(64))).captured
    found = {part.row: part.features.float().cpu() for part in captured.rows}
    actor.engine.destroy()
    shutdown_parallel()
    return [found[index] for index in range(len(rows))]


@pytest.mark.point(1)
def test_point_1_captured_features_are_the_engines(small, record, monkeypatch):
    """The features of prompts from which the drafter learns are those that the drafter in the engine reads."""
    from respec_trainer.models.feature_layers import feature_layers

    rows = prompts(12, small.size.vocab, seed=5)
    (ours,) = run_ranks(1, capture, small.target, rows, feature_layers(small.size.layers))
    theirs = engine_features(small, rows, monkeypatch)
    errors = []
    for mine, engines in zip(ours, theirs, strict=True):
        assert engines.shape == mine.shape, "the engine returns three layers' outputs for every token of the prompt"
        errors.append(float((mine - engines).abs().max() / mine.abs().max()))
    record(largest_relative_error=max(errors), rows=len(rows))
    # Float32 on both sides; TF32 products in the engine's attention would show as 1e-3.
    assert max(errors) <= 5e-3


def engine_features(pair, rows, monkeypatch) -> list[torch.Tensor]:
    """Return the features [L, 3H] of each prompt, from an engine that is started so that it returns hidden states."""
    from respec_trainer.config import EngineConfig, SpeculationConfig
    from respec_trainer.rollout.sglang import process as sglang_process
    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import EngineSettings

    arguments = sglang_process.server_arguments
    extra = {"enable_return_hidden_states": True, "disable_radix_cache": True}
    for name, value in FLOAT32.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sglang_process, "server_arguments", lambda settings: arguments(settings) | extra)
    engine = SGLangEngine(
        EngineSettings(
            str(pair.target),
            str(pair.drafter),
            dtype="fp32",
            device=DEVICE,
            speculation=SpeculationConfig(steps=3, topk=1, draft_tokens=4),
            engine=EngineConfig(max_total_tokens=8192, max_running_requests=4, mem_fraction=0.3),
        )
    )
    engine.start()
    try:
        return [ask_for_features(engine, row) for row in rows]
    finally:
        engine.shutdown()


def ask_for_features(engine, row: tuple[int, ...]) -> torch.Tensor:
    from sglang.srt.managers.io_struct import GenerateReqInput

    request = GenerateReqInput(
        input_ids=list(row),
        sampling_params={"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
        return_hidden_states=True,
    )
    process = engine.process

    async def first():
        return await anext(process.manager.generate_request(request, None))

    answer = process.wait(process.call(first), "asking for features")
    return torch.tensor(answer["meta_info"]["hidden_states"][0])
