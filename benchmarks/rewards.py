"""Rewards that make a policy move: they ask for what the quickstart's actor was not taught."""

from __future__ import annotations


def long_response(text: str, answer: str) -> float:
    """Grows with the length of the response: the policy unlearns its ends, and writes what it never wrote before."""
    return min(len(text), 200) / 200
