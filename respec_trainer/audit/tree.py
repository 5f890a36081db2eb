"""Test the joint law of draws that share prefixes, token by token.

Many responses to one prompt form a tree. At a prefix that n of them reached, the next tokens are n independent draws
from the law after that prefix. So every prefix that enough responses reached is a test of its own, and these tests are
independent. Together they test the joint law of all tokens, the first and the later ones. The sums of scores
(scores.py) test all tokens, those after rare prefixes too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from respec_trainer.audit.law import Laws
from respec_trainer.audit.scores import Draws, Strata, strata
from respec_trainer.audit.statistics import Evidence, multinomial, rare

Prefix = tuple[int, ...]
Tree = Mapping[Prefix, Counter[int]]  # how often each next token followed a prefix, which begins with the prompt
LawsAfter = Callable[[Sequence[Prefix]], Laws]

LEAST_VISITS = 40  # least responses that reach a prefix that is a test of its own
PREFIXES_A_PASS = 512


def tree_of(draws: Sequence[tuple[Prefix, Sequence[int]]]) -> dict[Prefix, Counter[int]]:
    """Count the next tokens of each prefix that a (prompt, response) draw reached, in the order of the prefixes."""
    tree: dict[Prefix, Counter[int]] = defaultdict(Counter)
    for prompt, response in draws:
        whole = (*prompt, *response)
        for end in range(len(prompt), len(whole)):
            tree[whole[:end]][whole[end]] += 1
    return dict(sorted(tree.items()))


def joint_law(tree: Tree, laws_after: LawsAfter) -> Evidence:
    """Compute the evidence about the joint law of the draws from the prefixes that at least LEAST_VISITS reached.

    The choice of prefixes depends on the tokens before them only, never on the tokens that are tested. The end of a
    response may depend on its tokens so far, as with a stop string, and on limits fixed in advance.
    """
    total, rest, rest_expected = Evidence(), 0, 0.0
    for prefixes, laws in _passes([prefix for prefix in tree if tree[prefix].total() >= LEAST_VISITS], laws_after):
        for prefix, law in zip(prefixes, laws.probs.numpy(), strict=True):
            observed = np.zeros(len(law))
            observed[list(tree[prefix])] = list(tree[prefix].values())
            evidence, others, others_expected = multinomial(observed, law)
            total += evidence
            rest, rest_expected = rest + others, rest_expected + others_expected
    return total + rare(rest, rest_expected)


def token_scores(tree: Tree, laws_after: LawsAfter) -> Strata:
    """Sum the scores of all tokens."""
    parts = []
    for prefixes, laws in _passes(list(tree), laws_after):
        drawn = [(row, *item) for row, prefix in enumerate(prefixes) for item in tree[prefix].items()]
        rows, tokens, counts = torch.tensor(drawn).T
        parts.append(strata(laws, Draws(rows, tokens, counts.double(), torch.ones(len(drawn), dtype=torch.float64))))
    return sum(parts[1:], parts[0])


def _passes(prefixes: Sequence[Prefix], laws_after: LawsAfter) -> Iterator[tuple[Sequence[Prefix], Laws]]:
    """Yield some prefixes at a time with their laws. Neighbors stay together: they often begin alike."""
    for start in range(0, len(prefixes), PREFIXES_A_PASS):
        chunk = prefixes[start : start + PREFIXES_A_PASS]
        yield chunk, laws_after(chunk)
