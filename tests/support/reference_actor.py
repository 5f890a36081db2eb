"""The update of an actor, written out in one process: the reference for `Actor.update`."""

from __future__ import annotations

from pathlib import Path

import torch

from respec_trainer.rollout.batch import Batch
from tests.support.actors import OPTIM, STEPS, make_batch
from tests.support.models import tiny_model


def reference_scores(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs and entropies [B, S] of every token but the first."""
    scores = model(tokens).logits[:, :-1].log_softmax(-1)
    logprobs, entropy = scores.gather(-1, tokens[:, 1:, None])[..., 0], -(scores.exp() * scores).sum(-1)
    return torch.nn.functional.pad(logprobs, (1, 0)), torch.nn.functional.pad(entropy, (1, 0))


def train_reference(hf_config, batch: Batch, advantages: torch.Tensor, aggregation: str, updates: list[slice]) -> dict:
    """Make one update on the rows of each slice, in one batch in this process, with the objective written out."""
    model = tiny_model(hf_config)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": OPTIM["actor.optim.weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=OPTIM["actor.optim.eps"])
    norms, losses, divergences = [], [], []
    with torch.no_grad():
        old, entropy = reference_scores(model, batch.tokens)
    for step, rows in enumerate(updates):
        mask, advantage = batch.response_mask[rows], advantages[rows, None]
        moved = reference_scores(model, batch.tokens[rows])[0] - old[rows]
        ratio = moved.exp()
        divergences += (moved.detach().double().expm1() - moved.detach())[mask].tolist()  # of old to now
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        gain = gain * (old - batch.sampler_logprobs)[rows].exp().clamp(max=2.0)
        by_row = (gain * mask).sum(1)
        loss = -(by_row.sum() / mask.sum() if aggregation == "token" else (by_row / mask.sum(1)).mean())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM["actor.optim.clip"]).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = OPTIM["actor.optim.lr"] * (step + 1) / 2
        optimizer.step()
        optimizer.zero_grad()
    assert norms[0] > OPTIM["actor.optim.clip"], "clipping must be part of the comparison"
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask, mismatch = batch.response_mask, reference_mismatch(old, batch)
    scores = {"old": old * mask, "entropy": entropy * mask, "mismatch": mismatch}
    scores |= {"kl": sum(divergences) / len(divergences)}
    return scores | {"norms": norms, "losses": losses, "weights": weights}


def reference_mismatch(old: torch.Tensor, batch: Batch) -> dict[str, float]:
    log_ratio = (old - batch.sampler_logprobs)[batch.response_mask].double()
    origins, ratio = batch.origins[batch.response_mask], log_ratio.exp()
    divergence = ratio - 1 - log_ratio
    metrics = {"kl": divergence.mean(), "ratio_max": ratio.max(), "ratio_min": ratio.min()}
    metrics |= {"clipped": (ratio > 2).double().mean()}
    for threshold in (1.1, 1.5, 2):
        metrics[f"above_{threshold}"] = (torch.maximum(ratio, 1 / ratio) > threshold).double().mean()
    for value, origin in enumerate(("plain", "accepted", "bonus")):
        metrics[f"kl_{origin}"] = divergence[origins == value].mean()
    return {f"mismatch/{name}": value.item() for name, value in metrics.items()}


def weight_error(result: dict, expected: dict) -> float:
    """Return the largest difference of a weight, relative to the largest entry of its tensor."""
    assert result["weights"].keys() == expected["weights"].keys()
    return max(
        ((weight - expected["weights"][name]).abs().max() / expected["weights"][name].abs().max()).item()
        for name, weight in result["weights"].items()
    )


def norm_error(result: dict, expected: dict) -> float:
    norms = [stats["policy/grad_norm"] for stats in result["stats"]]
    return max(abs(norm / want - 1) for norm, want in zip(norms, expected["norms"], strict=True))


def expectation(folder: Path, aggregation: str = "token", updates: list[slice] | None = None) -> dict:
    from respec_trainer.actor.loading import load_hf_config

    hf_config = load_hf_config(folder)
    expected = train_reference(
        hf_config, *make_batch(hf_config.vocab_size), aggregation, updates or [slice(None)] * STEPS
    )
    for name, weight in tiny_model(hf_config).named_parameters():
        moved = (weight - expected["weights"][name]).abs().max()
        assert moved > 1e-3, f"the updates hardly move {name}: comparing it would prove nothing"
    return expected
