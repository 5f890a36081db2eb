"""Count the verify passes that a recorded response would have taken with a drafter.

A chain of drafts holds the drafter's first choices, and verification accepts a draft exactly if the target draws the
same token. The recorded response holds the tokens that the target drew, so going along it pass by pass gives the
engine's distribution of passes: acceptances at different depths depend on each other, passes begin where the engine
would begin them, and responses end. A product of mean acceptances ignores all three.

A pass from position t, where x_{t+1} is the last known token, drafts x_{t+2} .. x_{t+1+s}. The a drafts before the
first miss are accepted and one more token is drawn, so the next pass begins at t + a + 1. The first token of a response
is drawn with the prompt and belongs to no pass. Only tokens of the response are counted. SGLang's histogram of accepted
drafts also counts those that the last pass accepts past a response's end, a visible share if responses are short.
"""

from __future__ import annotations

import torch


def verify_passes(hits: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Count the passes of each response with chains of s = 1 .. K drafts: [B, K] int64, at index s - 1.

    Args:
        hits: [B, S, K] bool, True if the draft for x_{t+2+k}, given the tokens before it, equals it; False where
            x_{t+2+k} is not a response token.
        response_mask: [B, S] bool, one run of response tokens a row, not at its first token; may be empty.
    """
    batch, width, depths = hits.shape
    first = response_mask.long().argmax(1)  # the response's first token
    end = first + response_mask.sum(1)
    position = torch.arange(width, device=hits.device).view(1, -1, 1)
    accepted = hits.long().cumprod(-1).cumsum(-1)  # [B, S, K]: drafts accepted of a chain of k + 1
    drafts = (position + 2 < end.view(-1, 1, 1)).expand(batch, width, depths)  # True where a token is left to draft
    # Count the passes from every position to the end at once. Each round doubles how many passes `following` skips, so
    # log2(S) rounds are enough.
    following = torch.where(drafts, position + 1 + accepted, width - 1).clamp(max=width - 1)
    passes = drafts.long()
    for _ in range(width.bit_length()):
        passes = passes + passes.gather(1, following)
        following = following.gather(1, following)
    start = (first - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, depths)
    return passes.gather(1, start).squeeze(1)


def pass_tokens(response_mask: torch.Tensor) -> torch.Tensor:
    """The number of tokens of each response that passes yield, [B] int64: all but the first."""
    return (response_mask.sum(1) - 1).clamp(min=0)
