"""The policy model's errors against transformers' on the same weights: logits, log-probs, entropies and gradients."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tests.support.models import tiny_model, tiny_run_config

TOLERANCE = 1e-5  # relative to the largest entry; fp32 rounding over two layers stays below 5e-6
TEMPERATURE = 0.7


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def example(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens [3, 16], a mask of responses, and a factor [2, 3, 16] for each log-prob and entropy in the loss."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (3, 16), generator=generator)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[0, 5:], mask[1, 1:4], mask[2, 15:] = True, True, True
    return tokens, mask, torch.randn(2, 3, 16, generator=generator)


def reference(model, tokens, mask, factors) -> dict:
    """Return logits, log-probs, entropies and gradients of the transformers model."""
    logits = model(tokens).logits
    scores = (logits[:, :-1] / TEMPERATURE).log_softmax(-1)
    logprobs, entropy = torch.zeros(tokens.shape), torch.zeros(tokens.shape)
    logprobs[:, 1:] = scores.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy[:, 1:] = -(scores.exp() * scores).sum(-1)
    logprobs, entropy = logprobs * mask, entropy * mask
    model.zero_grad()
    (logprobs * factors[0] + entropy * factors[1]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": logits, "logprobs": logprobs, "entropy": entropy, "gradients": gradients}


def gathered(tensor: torch.Tensor, group) -> list[torch.Tensor]:
    shards = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, tensor.detach().contiguous(), group=group)
    return shards


def worst_errors(cases: list[tuple]) -> dict[tuple, dict[str, float]]:
    """Return, on each rank, the largest errors by kind for each (folder, sequence_parallel, recompute)."""
    from respec_trainer.actor.loading import load_hf_config, load_weights
    from respec_trainer.actor.model import build_model
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.weights.hf_map import to_hf

    tp = int(os.environ["WORLD_SIZE"])
    results = {}
    topology = init_parallel(tiny_run_config("-", {"actor.parallel.tp": tp}))
    for folder, sequence_parallel, recompute in cases:
        hf_config = load_hf_config(folder)
        changes = {"tp": tp, "sequence_parallel": sequence_parallel}
        overrides = {"actor.parallel": changes, "actor.recompute": recompute, "actor.logprob_chunk": 5}
        config = tiny_run_config(folder, overrides | {"rollout.sampling.temperature": TEMPERATURE})
        model = build_model(hf_config, config.actor, torch.float32, topology.device, config.rollout.sampling)
        load_weights(model, hf_config, folder, topology)
        tokens, mask, factors = example(hf_config.vocab_size)
        expected = reference(tiny_model(hf_config), tokens, mask, factors)
        everywhere = torch.ones_like(mask)
        logits = torch.cat(gathered(model(tokens, everywhere, want="logits"), topology.tp_group), 1)
        logits = logits.view(*tokens.shape, -1)
        logprobs, entropy = model(tokens, mask)
        (logprobs * factors[0] + entropy * factors[1]).sum().backward()
        errors = {
            "logits": relative_error(logits[..., : hf_config.vocab_size], expected["logits"]),
            "padding": float(logits[..., hf_config.vocab_size :].exp().sum()),
            "logprobs": relative_error(logprobs, expected["logprobs"]),
            "entropy": relative_error(entropy, expected["entropy"]),
        }
        gradients = {}
        for name, parameter in model.named_parameters():
            shards = gathered(parameter.grad, topology.tp_group)
            if not getattr(parameter, "tensor_model_parallel", False):
                errors["replicas"] = max(errors.get("replicas", 0.0), float((shards[0] - shards[-1]).abs().max()))
                shards = shards[:1]
            gradients |= dict(to_hf(name, shards, hf_config))
        assert gradients.keys() == expected["gradients"].keys()
        errors["gradients"] = max(relative_error(g, expected["gradients"][n]) for n, g in gradients.items())
        results[hf_config.model_type, hf_config.tie_word_embeddings, sequence_parallel, recompute, tp] = errors
    shutdown_parallel()
    return results


def check_errors(results: list[dict]) -> None:
    for rank, errors in enumerate(results):
        for case, by_kind in errors.items():
            if rank == 0:
                print(case, {kind: f"{error:.1e}" for kind, error in by_kind.items()})
            assert by_kind.pop("padding") == 0.0, case
            assert by_kind.pop("replicas") == 0.0, f"{case}: replicated weights have different gradients"
            for kind, error in by_kind.items():
                assert error <= TOLERANCE, f"{case}: {kind} differ by {error:.1e}"
