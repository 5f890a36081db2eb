"""Deliveries: what the engine has handed over of each request so far, finished or not, for when it dies.

sglang's scheduler sends the tokens of running requests along the way: all of a batch, in one message a pass. How often
is a setting of its environment.

What may be kept of an engine that died? Only as much that what is discarded does not decide what is kept.

- If every pass's tokens are delivered (`rollout.engine.resume=tokens`), what is kept is a prefix of the passes, and a
  pass is kept or lost for all requests alike, whatever it drew. The next token's law given the tokens so far is the
  same for the new engine, so continuing is exact, as far as the moment of death does not hang on tokens that were
  drawn and not delivered.
- If tokens come late (`resume=start`), a finished response is here whole and a running one is not: to keep the former
  and draw the latter again would favor short responses. Then everything that was asked of the engine is drawn again.
  That is not exact either: a phase is kept if it ended before the death, which favors phases without long responses,
  though only among those that a death met. With `rollout.sampling.seeded` the same responses are drawn again, and
  nothing is favored.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

LOST = {"type": "lost"}
# Tokens of a running request between two messages. Every pass costs a very small model 6 to 9 %.
INTERVALS = {"tokens": 1, "start": 50}


def delivery_environment(resume: Literal["tokens", "start"]) -> dict[str, str]:
    return {"SGLANG_FORCE_STREAM_INTERVAL": str(INTERVALS[resume])}


@dataclass
class _Progress:
    state: Any  # sglang's record of the request; its lists only grow
    tokens: int
    finish_reason: dict[str, Any] | None
    verify_count: int
    accept_histogram: list[int]
    cached_tokens: int
    lengths: dict[str, int]  # of the lists in state.customized_info_accumulated


class Deliveries:
    """Filled by the engine's thread, message by message; read by others, who never see half of a message."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: dict[str, _Progress] = {}

    def commit(self, states: Sequence[Any], message: Any) -> None:
        """Note how far each request is, once sglang has taken in `message`; `states` are its records of them."""
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

    def forget(self, ids: Sequence[str]) -> None:
        with self._lock:
            for rid in ids:
                self._progress.pop(rid, None)

    def output(self, rid: str) -> dict[str, Any]:
        """What is there of a request, in the shape of sglang's output of a finished one."""
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
