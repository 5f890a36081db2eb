"""Rewards that change a policy much: they reward behavior that the quickstart's actor was not taught."""

from __future__ import annotations


def long_response(text: str, answer: str) -> float:
    """Return a reward that grows with the characters of a response, up to a length that its tokens cannot reach.

    First the policy stops ending its responses, then it writes new texts with longer and longer tokens.
    """
    return min(len(text), 700) / 700
