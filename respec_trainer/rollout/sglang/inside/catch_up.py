"""Backlog of tokens that the drafter did not read while speculation was off, and the pass that reads them.

A plain decoding step at position t reads token x[t], computes the target's features a[t] and draws x[t + 1]. The
drafter's key and value at t depend on the pair (x[t + 1], a[t]) only. While speculation is off they are not needed, so
the pairs are only kept. Before the next draft they go through the drafter in one pass, like a prompt. The drafter's
cache is then the same as if it had read every token at once, so the drafts are the same too.

Each request has its own count of missed tokens (`respec_missed`). A finished request does not come back. A retracted
request has its prompt read again, by the drafter too, so its tokens are removed from the backlog (`remove`).

Shapes: B sequences of a decode batch, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

# Tokens at most in one pass of the drafter. On a CPU the attention mask has a row for each of them, over their context.
TOKENS_OF_PASS = 4096


class Chunk(NamedTuple):
    """Tokens and features of one decode step that the drafter has not read."""

    requests: list  # [B]; None for a removed one
    tokens: torch.Tensor  # [B] drawn by the step
    features: torch.Tensor  # [B, 3H] of the preceding tokens

    def of(self, running: set[int]) -> Chunk:
        """Return the part of the requests with these `id()`s, which are unique while the chunk refers to them."""
        rows = [row for row, request in enumerate(self.requests) if id(request) in running]
        if len(rows) == len(self.requests):
            return self
        index = torch.tensor(rows, dtype=torch.int64, device=self.tokens.device)
        return Chunk([self.requests[row] for row in rows], self.tokens[index], self.features[index])


class Missed(NamedTuple):
    """Part of a backlog, sequence by sequence, each in the order of its positions."""

    counts: list[int]  # [B]
    tokens: torch.Tensor  # [sum of counts]
    features: torch.Tensor  # [sum of counts, 3H]


class Backlog:
    """Chunks in the order of their steps. A request with tokens in one chunk is in all later chunks, until it ends.

    Args:
        most_bytes: size of the features above which `full` is true.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self.chunks: list[Chunk] = []
        self.bytes = 0

    def add(self, requests: Sequence[Any], tokens: torch.Tensor, features: torch.Tensor) -> None:
        """Keep a step's tokens [B] and features [B, 3H], which must not change later."""
        for request in requests:
            request.respec_missed = missed(request) + 1
        self.chunks.append(Chunk(list(requests), tokens, features))
        self.bytes += features.nbytes

    def remove(self, requests: Sequence[Any]) -> None:
        """Remove requests whose tokens the drafter will read again with their prompts."""
        removed = {id(request) for request in requests if missed(request)}
        for request in requests:
            request.respec_missed = 0
        for chunk in self.chunks if removed else ():
            chunk.requests[:] = [None if id(request) in removed else request for request in chunk.requests]

    def full(self, requests: Sequence[Any]) -> bool:
        """Return whether the tokens of `requests` take too much memory; discard those of finished requests first."""
        if self.bytes <= self.most_bytes:
            return False
        self._keep_only(requests)
        # If discarding frees less than half, the backlog would soon be full again, and be searched for few tokens.
        return self.bytes > self.most_bytes // 2

    def pop(self, requests: Sequence[Any], most_tokens: int) -> Missed:
        """Take the oldest chunks: at least one, and more while they have at most `most_tokens` tokens of `requests`."""
        running = {id(request) for request in requests}
        chunks, total = [], 0
        for chunk in self.chunks:
            part = chunk.of(running)
            if chunks and total + len(part.requests) > most_tokens:
                break
            chunks.append(part)
            total += len(part.requests)
            self.bytes -= chunk.features.nbytes
        self.chunks = self.chunks[len(chunks) :]
        by_sequence = _rows_of(requests, chunks)
        order = torch.tensor([row for rows in by_sequence for row in rows], dtype=torch.int64)
        for request, rows in zip(requests, by_sequence, strict=True):
            request.respec_missed = missed(request) - len(rows)
        tokens, features = torch.cat([c.tokens for c in chunks]), torch.cat([c.features for c in chunks])
        order = order.to(tokens.device)
        return Missed([len(rows) for rows in by_sequence], tokens[order], features[order])

    def clear(self) -> None:
        """Discard everything; call it when no request has missed tokens."""
        self.chunks, self.bytes = [], 0

    def _keep_only(self, requests: Sequence[Any]) -> None:
        running = {id(request) for request in requests}
        self.chunks = [part for chunk in self.chunks if (part := chunk.of(running)).requests]
        self.bytes = sum(chunk.features.nbytes for chunk in self.chunks)


def missed(request: Any) -> int:
    """Return the number of the request's tokens that the drafter has not read."""
    return getattr(request, "respec_missed", 0)


def _rows_of(requests: Sequence[Any], chunks: Sequence[Chunk]) -> list[list[int]]:
    """Return each request's rows in the joined chunks, which must contain no other requests."""
    index = {id(request): i for i, request in enumerate(requests)}
    rows: list[list[int]] = [[] for _ in requests]
    for row, request in enumerate(request for chunk in chunks for request in chunk.requests):
        rows[index[id(request)]].append(row)
    return rows


def catch_up(worker: Any, batch: Any, backlog: Backlog, most_tokens: int | None = None) -> int:
    """Let the drafter of an EAGLEWorkerV2 read its missed tokens of a decode batch; return how many it read.

    most_tokens: read about this many at most, the oldest first; None for all. Once all are read, the batch's input
    for the drafter is the same as if it had missed none.
    """
    lengths = batch.seq_lens.tolist()  # on a GPU this waits for the previous batch
    behind = [missed(request) for request in batch.reqs]
    todo = min(sum(behind), most_tokens or sum(behind))
    done = 0
    while done < todo:
        part = backlog.pop(batch.reqs, min(TOKENS_OF_PASS, todo - done))
        if any(part.counts):
            _read(worker, batch, part, [length - b for length, b in zip(lengths, behind, strict=True)])
        behind = [b - count for b, count in zip(behind, part.counts, strict=True)]
        done += sum(part.counts)
    if not any(behind):
        backlog.clear()
    return done


def _read(worker: Any, batch: Any, part: Missed, first: list[int]) -> None:
    """Run one pass of the drafter over `part`, from position `first` of each sequence on; update batch.spec_info.

    It uses sglang's pass over prompts, which shifts the tokens by one itself and takes each sequence's last token as a
    separate argument.
    """
    rows = [row for row, count in enumerate(part.counts) if count]
    counts = [part.counts[row] for row in rows]
    prompt = _as_prompt(batch, rows, [first[row] for row in rows], counts)
    tokens = part.tokens.long()
    prompt.input_ids = tokens.roll(1)
    ends = torch.tensor(counts).cumsum(0) - 1
    read = worker.draft_worker._draft_extend_for_prefill(prompt, part.features, tokens[ends.to(tokens.device)])
    where = torch.tensor(rows, device=tokens.device)
    for name in ("topk_p", "topk_index", "hidden_states"):
        whole, new = getattr(batch.spec_info, name), getattr(read, name)
        setattr(batch.spec_info, name, whole.index_copy(0, where, new.to(whole.dtype)))


def _as_prompt(batch: Any, rows: list[int], first: list[int], counts: list[int]) -> Any:
    """Return a copy of the ScheduleBatch as a prompt batch: `counts` tokens from position `first` on of `rows`.

    Their cache slots are those that the target's pass wrote.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    prompt = copy.copy(batch)
    ends = [start + count for start, count in zip(first, counts, strict=True)]
    where = torch.tensor(rows)
    prompt.reqs = [batch.reqs[row] for row in rows]
    prompt.forward_mode = ForwardMode.EXTEND
    prompt.prefix_lens, prompt.extend_lens, prompt.extend_num_tokens = first, counts, sum(counts)
    prompt.seq_lens_cpu = torch.tensor(ends)
    prompt.seq_lens = prompt.seq_lens_cpu.to(batch.seq_lens)
    prompt.seq_lens_sum = sum(ends)
    prompt.orig_seq_lens = prompt.seq_lens.int()
    prompt.req_pool_indices = batch.req_pool_indices[where.to(batch.seq_lens.device)]
    prompt.req_pool_indices_cpu = None if batch.req_pool_indices_cpu is None else batch.req_pool_indices_cpu[where]
    prompt.return_logprob, prompt.extend_logprob_start_lens = False, [0] * len(rows)
    prompt.chunked_req = prompt.chunked_req_next_prompt_token = prompt.multimodal_inputs = None
    positions = torch.cat([torch.arange(start, end) for start, end in zip(first, ends, strict=True)])
    owners = prompt.req_pool_indices.repeat_interleave(torch.tensor(counts).to(batch.seq_lens.device))
    slots = batch.req_to_token_pool.req_to_token[owners, positions.to(batch.seq_lens.device)]
    prompt.out_cache_loc = slots.long()
    return prompt
