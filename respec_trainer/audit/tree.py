"""Test the joint law of draws that share prefixes, token by token.

Many responses to one prompt form a tree. At a prefix that n of them reached, the next tokens are n independent draws
from the law after that prefix. So every prefix that enough responses reached is a test of its own, and these tests are
independent. Together they test the joint law of all tokens, the first and the later ones.
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

LEAST_VISITS = 40  # least responses that reach a prefix for its law to be worth a forward pass
PREFIXES_A_PASS = 64


def branches(draws: Sequence[tuple[Prefix, Sequence[int]]]) -> dict[Prefix, Counter[int]]:
    """Count the next tokens of each prefix that at least LEAST_VISITS of the (prompt, response) draws reached.

    A prefix begins with the prompt. The choice of prefixes depends on the tokens before them only, never on the tokens
    that are tested.
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
    """Compute the evidence about the joint law of (prompt, response) draws.

    The end of a response may depend on its tokens so far, as with a stop string, and on limits fixed in advance.
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
