"""KeptTokens: counts the tokens that a batch's responses keep of a decode step, without those behind their ends.

sglang appends all accepted tokens of a verify pass to a request, and then looks for the response's end among them: a
stop token, a stop string or the length limit. `finished_len` is where it found one. Plain Python, without sglang.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class KeptTokens:
    """Lengths of the requests' responses before a step's results; make it before sglang adds them."""

    def __init__(self, requests: Sequence[Any]):
        self.requests = list(requests)
        # None: sglang computes the request once more and discards what it draws.
        self.before = [None if r.finished() or r.is_retracted else len(r.output_ids) for r in requests]

    @property
    def running(self) -> list[bool]:
        """For each request whether it takes this step's tokens."""
        return [before is not None for before in self.before]

    def count(self) -> list[int]:
        """Return the tokens that each response has kept since."""
        pairs = zip(self.requests, self.before, strict=True)
        return [0 if before is None else _length(request) - before for request, before in pairs]

    def ended(self) -> int:
        """Return how many responses have ended since."""
        return sum(runs and request.finished() for request, runs in zip(self.requests, self.running, strict=True))


def _length(request: Any) -> int:
    return len(request.output_ids) if request.finished_len is None else request.finished_len
