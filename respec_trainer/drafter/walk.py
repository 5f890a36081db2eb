"""How many verify passes a recorded response would have taken, had a drafter drafted for it.

A response drawn by the target fixes what verification does with a chain of chosen drafts: the target accepts a draft
exactly if it draws the same token, and the response says what it drew. So a walk along the response, pass by pass,
follows the engine's law: depths depend on each other as they do there, passes begin where they begin there, and
responses end. Products of mean acceptances leave all three out.

From position t, x_{t+1} being the last token known, a pass drafts x_{t+2} .. x_{t+1+s}; of these the a before the
first miss are accepted and one more token is drawn, so the next pass is from t + a + 1. The first token of a response
is drawn with the prompt and belongs to no pass. Counted are tokens that stay: SGLang's histogram of accepted drafts
also holds those that the last pass found beyond a response's end, which for short responses is a share that shows.
"""

from __future__ import annotations

import torch


def verify_passes(hits: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Passes each response takes with chains of s = 1 .. K drafts, [B, K] int64, s - 1 being the index.

    Args:
        hits: [B, S, K] bool, whether the draft for x_{t+2+k}, given the tokens before it, equals it; False where
            x_{t+2+k} is no response token.
        response_mask: [B, S] bool, one run of response tokens a row, not from its first token on; may be empty.
    """
    batch, width, depths = hits.shape
    first = response_mask.long().argmax(1)  # the response's first token
    end = first + response_mask.sum(1)
    position = torch.arange(width, device=hits.device).view(1, -1, 1)
    accepted = hits.long().cumprod(-1).cumsum(-1)  # [B, S, K]: by a chain of k + 1 drafts
    drafts = (position + 2 < end.view(-1, 1, 1)).expand(batch, width, depths)  # something is left to be drafted
    # Pass counts to the end from every position at once, by doubling how far `then` jumps: log2(S) rounds.
    then = torch.where(drafts, position + 1 + accepted, width - 1).clamp(max=width - 1)
    passes = drafts.long()
    for _ in range(width.bit_length()):
        passes = passes + passes.gather(1, then)
        then = then.gather(1, then)
    start = (first - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, depths)
    return passes.gather(1, start).squeeze(1)


def pass_tokens(response_mask: torch.Tensor) -> torch.Tensor:
    """Tokens of each response that passes yield, [B] int64: all but the first."""
    return (response_mask.sum(1) - 1).clamp(min=0)
