"""Tiny drafters and rollouts, for tests."""

from __future__ import annotations

import torch

from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.drafter.eagle3 import Eagle3Drafter
from respec_trainer.drafter.online.stored import Row, Snapshot
from respec_trainer.drafter.shape import DrafterShape
from tests.support.models import tiny_config

DRAFT_IDS = torch.arange(64) * 2 + 1  # of the tiny models' 131 tokens


def target_config(family="qwen3", layers: int = 4, **changes):
    return tiny_config(family, layers=layers, **changes)


def tiny_drafter(hf_config=None, seed: int = 0, draft_vocab_size: int = 64) -> Eagle3Drafter:
    """A random drafter whose norms are not 1, so that tests detect a norm that is mixed up or left out."""
    drafter = Eagle3Drafter(DrafterShape.for_target(hf_config or target_config(), draft_vocab_size), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
    return drafter


def random_rollouts(lengths, vocab_size: int = 131, seed: int = 0) -> DrafterBatch:
    """One row for each (prompt length, response length), of random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    return DrafterBatch.collate([(draw(prompt), draw(response)) for prompt, response in lengths])


def stored_snapshot(hidden: int = 64, vocab_size: int = 131, seed: int = 0) -> Snapshot:
    """Random embeddings of all tokens, and output rows of DRAFT_IDS."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(vocab_size, hidden, generator=generator)
    return Snapshot(torch.arange(vocab_size), embeddings, torch.randn(len(DRAFT_IDS), hidden, generator=generator))


def stored_row(snapshot: Snapshot, step: int = 0, hidden: int = 64, prompt: int = 3, response: int = 7, seed=0) -> Row:
    """A row of random numbers; its log-sum-exps are over the logits of DRAFT_IDS, or 0 if sizes do not fit."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(response, hidden, generator=generator)
    fits = states.shape[1] == snapshot.output_rows.shape[1]
    return Row(
        tokens=torch.randint(3, 131, (prompt + response,), generator=generator),
        features=torch.randn(prompt + response, 3 * hidden, generator=generator),
        hidden=states,
        logsumexp=(states @ snapshot.output_rows.t()).logsumexp(-1) if fits else torch.zeros(response),
        snapshot=snapshot,
        weight=1.0,
        step=step,
        passes=4,
    )


WHOLE = torch.zeros(1 << 16)  # all tensors of `sized_row` are views of it, so that it takes no time and no memory


def sized_row(snapshot: Snapshot, response: int, step: int = 0, hidden: int = 2) -> Row:
    """A row of zeros whose size is that of a prompt of 4 tokens and a response; for tests of what is kept."""
    tokens = response + 4
    features, states = WHOLE[: 3 * hidden * tokens].view(tokens, -1), WHOLE[: hidden * response].view(response, -1)
    return Row(WHOLE[:tokens].long(), features, states, WHOLE[:response], snapshot, weight=1.0, step=step, passes=1)


def row_bytes(response: int, hidden: int = 2) -> int:
    """The bytes of `sized_row`: ids of 8 bytes, features, hidden states and log-sum-exps of 4."""
    return (response + 4) * (8 + 4 * 3 * hidden) + response * 4 * (hidden + 1)


def lognormal_lengths(steps: int, rows: int, seed: int, sigma: float = 0.8) -> list[list[int]]:
    """Lengths of responses of 60 tokens in the median and 400 at most; each step's the longest first, as captured."""
    noise = torch.randn(steps, rows, generator=torch.Generator().manual_seed(seed))
    lengths = (60 * (sigma * noise).exp()).long().clamp(1, 400)
    return lengths.sort(descending=True).values.tolist()
