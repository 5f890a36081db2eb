"""The joint law of draws that share prefixes, tested token by token.

Many responses to one prompt form a tree. At a prefix that n of them reached, the next tokens are n independent draws
from the law after that prefix, whatever came before: so every prefix reached often enough is a test of its own, and
the tests are independent. Together they test the joint law of all the tokens, the first and the deep ones alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from respec_trainer.audit.statistics import Evidence, multinomial, rare

Prefix = tuple[int, ...]
# Prefixes -> probabilities [R, V] float64 of the token after each.
Law = Callable[[Sequence[Prefix]], torch.Tensor]

LEAST_VISITS = 40  # of a prefix, for its law to be worth a forward pass
PREFIXES_A_PASS = 64


def branches(draws: Sequence[tuple[Prefix, Sequence[int]]]) -> dict[Prefix, Counter[int]]:
    """What followed each prefix (prompt included) that at least LEAST_VISITS of the (prompt, response) draws reached.

    Which prefixes are tested follows from what came before them, never from what is tested.
    """
    level: dict[Prefix, list[Sequence[int]]] = defaultdict(list)
    for prompt, response in draws:
        level[tuple(prompt)].append(response)
    found: dict[Prefix, Counter[int]] = {}
    depth = 0
    while level:
        deeper: dict[Prefix, list[Sequence[int]]] = defaultdict(list)
        for prefix, responses in level.items():
            going_on = [response for response in responses if len(response) > depth]
            if len(going_on) < LEAST_VISITS:
                continue
            found[prefix] = Counter(response[depth] for response in going_on)
            for response in going_on:
                deeper[(*prefix, response[depth])].append(response)
        level, depth = deeper, depth + 1
    return found


def joint_law(draws: Sequence[tuple[Prefix, Sequence[int]]], law: Law) -> Evidence:
    """Evidence about the joint law of (prompt, response) draws.

    Whether a response goes on may hang on its tokens so far, as with a stop string, and on limits fixed before it.
    """
    tree = branches(draws)
    total, rest, rest_expected = Evidence(), 0, 0.0
    prefixes = sorted(tree, key=len)
    for start in range(0, len(prefixes), PREFIXES_A_PASS):
        chunk = prefixes[start : start + PREFIXES_A_PASS]
        for prefix, row in zip(chunk, law(chunk).numpy(), strict=True):
            observed = np.zeros(len(row))
            for token, count in tree[prefix].items():
                observed[token] = count
            evidence, others, others_expected = multinomial(observed, row)
            total += evidence
            rest, rest_expected = rest + others, rest_expected + others_expected
    return total + rare(rest, rest_expected)
