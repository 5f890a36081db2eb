"""Rewards that make a policy move: they ask for what the quickstart's actor was not taught."""

from __future__ import annotations


def long_response(text: str, answer: str) -> float:
    """Grows with the characters of a response, beyond what its tokens can reach.

    First the policy unlearns its ends, then it writes what it never wrote before, in longer and longer tokens.
    """
    return min(len(text), 700) / 700
