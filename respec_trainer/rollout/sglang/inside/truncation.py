"""Truncation by top_k and top_p inside SGLang's scheduler: one distribution for drawing, verification and log-probs.

SGLang returns log-probs of the whole vocabulary, whatever it draws from. Here they are of the distribution that a token
is drawn from: top_k keeps the most probable tokens, then top_p keeps the most probable of these until they hold the
share top_p of their mass, and what is kept is renormalized. SGLang's verification of drafts truncates in this order;
its drawing without drafts measures the share before top_k, so it draws here from the distribution of verification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def truncation_hooks() -> dict[str, tuple[Callable, str]]:
    return {
        "sglang.srt.layers.sampler.Sampler._sample_from_probs": (draw_truncated, "AROUND"),
        "sglang.srt.layers.logprob_processor.compute_spec_logprobs": (with_truncated_logprobs, "AFTER"),
    }


def draw_truncated(original: Callable, sampler: Any, probs: torch.Tensor, info: Any, positions: Any, simple: bool):
    """Draw a token for each row of probs [B, V], truncated; hook around `Sampler._sample_from_probs`.

    The truncated probabilities replace those in `probs`, of which SGLang takes the log-probs afterwards.
    """
    if not simple:
        probs.copy_(truncated(probs, info))
    return original(sampler, probs, info, positions, True)


def with_truncated_logprobs(
    _result: None, batch: Any, output: Any, predicted: torch.Tensor, *, accept_index=None, chain_stride=None
) -> None:
    """Replace the log-probs [B, K] of verified tokens by those after truncation; hook after `compute_spec_logprobs`.

    accept_index: [B, K] the accepted nodes among all B * n, then -1; None: all nodes, with K = `chain_stride`.
    """
    info = batch.sampling_info
    if not (info.need_top_k_sampling or info.need_top_p_sampling) or info.is_all_greedy:
        return
    logits, tokens = output.next_token_logits, predicted
    if accept_index is not None:
        chosen = accept_index.long().reshape(-1)
        logits, tokens = logits[chosen], predicted[chosen]
    width = chain_stride if accept_index is None else accept_index.shape[1]
    probs = (logits / info.temperatures.repeat_interleave(width, dim=0)).softmax(-1)
    drawn = truncated(probs, info, width).gather(1, tokens.long().view(-1, 1))
    least = torch.finfo(drawn.dtype).min  # SGLang's value for a probability of 0, which JSON can hold
    output.next_token_logprobs = drawn.log().clamp(min=least).view(-1, width)


def truncated(probs: torch.Tensor, info: Any, width: int = 1) -> torch.Tensor:
    """Truncate and renormalize probs [B * width, V]; each of the B requests has its own top_k and top_p."""
    top_k, top_p = _renormalizers(probs.device.type)
    if info.need_top_k_sampling:
        probs = top_k(probs, info.top_ks.repeat_interleave(width, dim=0))
    if info.need_top_p_sampling:
        probs = top_p(probs, info.top_ps.repeat_interleave(width, dim=0))
    return probs


def _renormalizers(device: str) -> tuple[Callable, Callable]:
    """Return the functions that SGLang's verification (`eagle_utils.eagle_sample`) uses on such a device."""
    if device == "cuda":
        from flashinfer.sampling import top_k_renorm_probs, top_p_renorm_probs

        return top_k_renorm_probs, top_p_renorm_probs
    from sgl_kernel import top_k_renorm_prob, top_p_renorm_prob

    return top_k_renorm_prob, top_p_renorm_prob
