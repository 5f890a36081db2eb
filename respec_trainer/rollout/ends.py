"""Ends: what a decode batch gave its responses, and how many of them ended in it."""

from __future__ import annotations

from typing import NamedTuple


class Ends(NamedTuple):
    """The tokens that the responses of a decode batch kept, and the ends among them.

    A verify pass may accept drafts behind a stop token or behind the length limit; the response does not keep those.
    """

    tokens: float  # kept by the responses; a simulation may count expected tokens
    ended: int  # responses that ended in this batch
    over: int = 0  # sequences computed although their responses had ended before, as with overlapped scheduling
