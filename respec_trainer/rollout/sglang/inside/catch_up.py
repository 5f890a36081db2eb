"""What the drafter has not read while speculation was off, and how it reads it when speculation goes on.

A plain decoding step at position t reads token x[t], gives the target's features a[t] and draws x[t + 1]. The drafter's
key and value at t come from just these two: the pair (x[t + 1], a[t]). Without speculation nobody needs them, so the
pairs are only kept; before the next draft they go through the drafter in one pass, as a prompt's do. Its attention
over them ends where reading every token at once would have, so drafts are the same.

Requests carry their count of missed tokens themselves (`respec_missed`), which ends with them: a finished one is never
asked for again, one that is retracted has its prompt read anew, drafter included, and is forgotten here (`forget`).

Shapes: B sequences of a decode batch, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

# Tokens of one of the drafter's passes. Attention over a backlog needs a mask of its tokens by their contexts on a CPU.
TOKENS_OF_PASS = 4096


class Chunk(NamedTuple):
    """What one decode step left to be read."""

    requests: list  # [B]; None for one that has been forgotten
    tokens: torch.Tensor  # [B] drawn by the step
    features: torch.Tensor  # [B, 3H] of the tokens before them

    def of(self, running: set[int]) -> Chunk:
        """What is in it of the requests with these ids; it holds on to requests, so an id means one of them."""
        rows = [row for row, request in enumerate(self.requests) if id(request) in running]
        if len(rows) == len(self.requests):
            return self
        index = torch.tensor(rows, dtype=torch.int64, device=self.tokens.device)
        return Chunk([self.requests[row] for row in rows], self.tokens[index], self.features[index])


class Missed(NamedTuple):
    """Part of a backlog, sequence after sequence, each in the order of its positions."""

    counts: list[int]  # by sequence of the batch
    tokens: torch.Tensor  # [sum of counts]
    features: torch.Tensor  # [sum of counts, 3H]


class Backlog:
    """Chunks in the order of their steps. Every request whose tokens are in some of them is in all later ones.

    Args:
        most_bytes: of features, above which `full` says that they should be read.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self.chunks: list[Chunk] = []
        self.bytes = 0

    def add(self, requests: Sequence[Any], tokens: torch.Tensor, features: torch.Tensor) -> None:
        """Keep a step's tokens [B] and features [B, 3H], which must stay as they are."""
        for request in requests:
            request.respec_missed = missed(request) + 1
        self.chunks.append(Chunk(list(requests), tokens, features))
        self.bytes += features.nbytes

    def forget(self, requests: Sequence[Any]) -> None:
        """The drafter reads these requests' tokens anew, with their prompts."""
        gone = {id(request) for request in requests if missed(request)}
        for request in requests:
            request.respec_missed = 0
        for chunk in self.chunks if gone else ():
            chunk.requests[:] = [None if id(request) in gone else request for request in chunk.requests]

    def full(self, requests: Sequence[Any]) -> bool:
        """Whether it holds more than it may, of `requests`: what others left, who have finished, is thrown away."""
        if self.bytes <= self.most_bytes:
            return False
        self._keep_only(requests)
        # With less than half of it free, it would soon be full again, and be gone through for a few tokens.
        return self.bytes > self.most_bytes // 2

    def pop(self, requests: Sequence[Any], most_tokens: int) -> Missed:
        """Take the oldest chunks, with at most `most_tokens` of a batch's requests but at least one chunk."""
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
        """When no request runs."""
        self.chunks, self.bytes = [], 0

    def _keep_only(self, requests: Sequence[Any]) -> None:
        running = {id(request) for request in requests}
        self.chunks = [part for chunk in self.chunks if (part := chunk.of(running)).requests]
        self.bytes = sum(chunk.features.nbytes for chunk in self.chunks)


def missed(request: Any) -> int:
    """Tokens of a request that the drafter has not read."""
    return getattr(request, "respec_missed", 0)


def _rows_of(requests: Sequence[Any], chunks: Sequence[Chunk]) -> list[list[int]]:
    """By request, which rows of the joined chunks are its; the chunks hold no others."""
    place = {id(request): i for i, request in enumerate(requests)}
    rows: list[list[int]] = [[] for _ in requests]
    for row, request in enumerate(request for chunk in chunks for request in chunk.requests):
        rows[place[id(request)]].append(row)
    return rows


def catch_up(worker: Any, batch: Any, backlog: Backlog, most_tokens: int | None = None) -> int:
    """Have the drafter of an EAGLEWorkerV2 read what it missed of a decode batch; returns how many tokens.

    most_tokens: about how many at most, the oldest first; None for all. With all read, the batch's input holds for
    every sequence what the drafter would draft from had it never missed any.
    """
    lengths = batch.seq_lens.tolist()  # on a GPU this waits for the batch before, once in a catch-up
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
    """One pass of the drafter over `part`, which starts at position `first` of each sequence; updates batch.spec_info.

    It goes sglang's way for prompts, which shifts the tokens by one itself and takes each sequence's last apart.
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
    """A copy of the ScheduleBatch in which sequences `rows` have their `counts` tokens from position `first` on read.

    Their slots in the cache are those that the target's pass wrote.
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
