"""Logits after many prefixes, of which some continue others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from respec_trainer.audit.tree import Prefix

ROWS_A_PASS = 64
CACHE_BYTES = 2**30

# Token ids [B, S] and wanted positions [B, S] bool -> logits [N, V] after the N wanted positions, in row-major order.
LogitsAt = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def logits_after(prefixes: Sequence[Prefix], logits_at: LogitsAt, multiple_of: int = 1) -> torch.Tensor:
    """Return logits [R, V] after each of R different prefixes, of each end of a branch only one forward pass.

    Args:
        multiple_of: rows are padded to a multiple of this.
    """
    order = sorted(range(len(prefixes)), key=prefixes.__getitem__)
    ends: list[list[int]] = []  # prefixes, the last of which is a row that begins with all of them
    for index in order:
        if ends and prefixes[index][: len(prefixes[ends[-1][-1]])] == prefixes[ends[-1][-1]]:
            ends[-1].append(index)
        else:
            ends.append([index])
    found = [index for branch in ends for index in branch]
    parts = [
        _pass(ends[start : start + ROWS_A_PASS], prefixes, logits_at, multiple_of)
        for start in range(0, len(ends), ROWS_A_PASS)
    ]
    logits = torch.cat(parts)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(found), logits)


def _pass(branches: list[list[int]], prefixes: Sequence[Prefix], logits_at: LogitsAt, multiple_of: int) -> torch.Tensor:
    longest = max(len(prefixes[branch[-1]]) for branch in branches)
    tokens = torch.zeros(len(branches), -(-longest // multiple_of) * multiple_of, dtype=torch.int64)
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    for row, branch in enumerate(branches):
        tokens[row, : len(prefixes[branch[-1]])] = torch.tensor(prefixes[branch[-1]])
        wanted[row, [len(prefixes[index]) - 1 for index in branch]] = True
    return logits_at(tokens, wanted).cpu()


class LogitsCache:
    """The logits after prefixes, each computed once as long as there is room for them."""

    def __init__(self, logits_at: LogitsAt, multiple_of: int = 1):
        self.logits_at, self.multiple_of = logits_at, multiple_of
        self.known: dict[Prefix, torch.Tensor] = {}

    def __call__(self, prefixes: Sequence[Prefix]) -> torch.Tensor:
        """Return the logits [R, V] in the order of the prefixes, which are all different."""
        new = [prefix for prefix in prefixes if prefix not in self.known]
        if not new:
            return torch.stack([self.known[prefix] for prefix in prefixes])
        fresh = dict(zip(new, logits_after(new, self.logits_at, self.multiple_of), strict=True))
        answer = torch.stack([fresh[prefix] if prefix in fresh else self.known[prefix] for prefix in prefixes])
        if (len(self.known) + len(fresh)) * answer[0].nbytes <= CACHE_BYTES:
            self.known |= {prefix: row.clone() for prefix, row in fresh.items()}
        return answer

    def clear(self) -> None:
        """Forget all logits, because the weights have changed."""
        self.known.clear()
