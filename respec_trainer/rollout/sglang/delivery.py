"""Deliveries: the tokens that an engine has delivered for each request, finished or not, in case it dies.

sglang's scheduler sends the tokens of running requests while they run: those of a whole batch in one message. An
environment variable sets after how many tokens.

The tokens of a dead engine may be kept only if the discarded tokens do not affect which tokens are kept.

- If the tokens of every pass are delivered (`rollout.engine.resume=tokens`), the kept tokens are a prefix of the
  passes, and a pass is kept or lost for all requests alike, whatever tokens it drew. The next token's distribution
  given the tokens so far is the same on the new engine. So continuing is exact, provided that the moment of death does
  not depend on tokens that were drawn and not delivered.
- If tokens are delivered late (`resume=start`), a finished response is complete and a running one is not. Keeping the
  first and drawing the second again would favor short responses, so all requests of the engine are drawn again. That
  is not exact either: a phase is kept if it ended before the death, which favors phases without long responses, but
  only among phases in which an engine died. With `rollout.sampling.seeded` the same responses are drawn again, so
  nothing is favored.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

LOST = {"type": "lost"}
# Tokens of a running request between two messages. A message for every token slows a very small model by 6 to 9 %.
INTERVALS = {"tokens": 1, "start": 50}


def delivery_environment(resume: Literal["tokens", "start"]) -> dict[str, str]:
    return {"SGLANG_FORCE_STREAM_INTERVAL": str(INTERVALS[resume])}


@dataclass
class _Progress:
    state: Any  # sglang's record of the request; its lists only grow
    tokens: int
    finish_reason: dict[str, Any] | None  # None while the request runs
    verify_count: int
    accept_histogram: list[int]
    cached_tokens: int
    lengths: dict[str, int]  # of the lists in state.customized_info_accumulated


class Deliveries:
    """Progress of each request. The engine's thread writes it message by message; other threads read whole messages."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: dict[str, _Progress] = {}

    def commit(self, states: Sequence[Any], message: Any) -> None:
        """Record each request's progress once sglang has processed `message`; `states` are sglang's records."""
        progress = {}
        for i, (rid, state) in enumerate(zip(message.rids, states, strict=True)):
            if state is not None:
                progress[rid] = _Progress(
                    state=state,
                    tokens=len(state.output_ids),
                    finish_reason=message.finished_reasons[i],
                    verify_count=message.spec_verify_ct[i] if message.spec_verify_ct else 0,
                    accept_histogram=list(message.spec_correct_drafts_histogram[i]) if message.spec_verify_ct else [],
                    cached_tokens=message.cached_tokens[i],
                    lengths={name: len(values) for name, values in state.customized_info_accumulated.items()},
                )
        with self._lock:
            self._progress |= progress

    def remove(self, ids: Sequence[str]) -> None:
        with self._lock:
            for rid in ids:
                self._progress.pop(rid, None)

    def output(self, rid: str) -> dict[str, Any]:
        """Return the delivered part of a request, in the format of sglang's output for a finished one."""
        with self._lock:
            progress = self._progress.get(rid)
        if progress is None or (progress.finish_reason or LOST)["type"] == "abort":
            return {
                "output_ids": [],
                "meta_info": {"finish_reason": LOST, "output_token_logprobs": [], "cached_tokens": 0},
            }
        state, tokens = progress.state, progress.tokens
        meta = {
            "finish_reason": progress.finish_reason or LOST,
            "output_token_logprobs": state.output_token_logprobs[:tokens],
            "spec_verify_ct": progress.verify_count,
            "spec_correct_drafts_histogram": progress.accept_histogram,
            "cached_tokens": progress.cached_tokens,
        }
        meta |= {name: state.customized_info_accumulated[name][:n] for name, n in progress.lengths.items()}
        return {"output_ids": list(state.output_ids[:tokens]), "meta_info": meta}
