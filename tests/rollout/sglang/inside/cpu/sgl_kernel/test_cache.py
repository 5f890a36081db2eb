"""rollout/sglang/inside/cpu/stand_in/sgl_kernel/cache.py against loops over requests."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.rollout.sglang.inside.cpu import put_stand_in_on_path

put_stand_in_on_path()
from sgl_kernel import cache  # noqa: E402

SLOTS, WIDTH = 6, 40
spans = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 8)), min_size=1, max_size=SLOTS)


def table(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 999, (SLOTS, WIDTH), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def unpack(spans):
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(len(spans)))[: len(spans)]
    start = torch.tensor([start for start, _ in spans])
    return slots, start, start + torch.tensor([length for _, length in spans])


@settings(max_examples=50, deadline=None)
@given(spans)
def test_reading_and_writing_spans(spans):
    slots, start, end = unpack(spans)
    rows = table()
    expected = torch.cat([rows[s, a:b] for s, a, b in zip(slots, start, end, strict=True)]).long()
    out = torch.full((len(expected) + 3,), -1)
    cache.assign_extend_cache_locs_cpu(slots, rows, start, end, out, WIDTH)
    assert out.tolist() == expected.tolist() + [-1] * 3
    written, loop = torch.zeros(2, SLOTS, WIDTH, dtype=torch.int32)
    cache.assign_req_to_token_pool_cpu(slots, written, start, end, expected, WIDTH)
    for s, a, b in zip(slots, start, end, strict=True):
        loop[s, a:b] = rows[s, a:b]
    assert torch.equal(written, loop)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=SLOTS), st.integers(1, 3), st.integers(1, 5))
def test_rows_of_draft_steps(lens, topk, steps):
    slots, seq_lens, _ = unpack([(length, 0) for length in lens])
    rows = table(1)
    out = torch.empty(len(lens) * topk * steps, dtype=torch.int64)
    cache.assign_draft_cache_locs_contiguous_cpu(slots, rows, seq_lens, out, WIDTH, topk, steps)
    expected = [rows[s, n : n + topk * steps].tolist() for s, n in zip(slots, seq_lens, strict=True)]
    assert out.view(len(lens), -1).tolist() == expected
    branches = cache.build_draft_decode_metadata_cpu(rows, slots, seq_lens, topk, steps, WIDTH)
    for request, (slot, length) in enumerate(zip(slots, seq_lens, strict=True)):
        for branch in range(topk):
            own = rows[slot, length + branch * steps : length + (branch + 1) * steps]
            row = branches[request * topk + branch, : length + steps]
            assert row.tolist() == rows[slot, :length].tolist() + own.tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=0, max_size=12), st.randoms(use_true_random=False))
def test_moving_rows_that_overlap(source, random):
    target = random.sample(range(12), len(source))
    buffers = [torch.randn(12, 3, 2), torch.randn(12, 5).to(torch.bfloat16)]
    expected = [buffer.clone() for buffer in buffers]
    for buffer, wanted in zip(buffers, expected, strict=True):
        for t, s in zip(target, source, strict=True):
            wanted[t] = buffer[s]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
    strides = torch.tensor([buffer[0].numel() * buffer.element_size() for buffer in buffers])
    cache.copy_all_layer_kv_cache_cpu(addresses, strides, torch.tensor(target), torch.tensor(source))
    for buffer, wanted in zip(buffers, expected, strict=True):
        assert torch.equal(buffer, wanted)


def test_accepted_nodes_are_packed():
    out = torch.zeros(6, dtype=torch.int64)
    cache.fill_accept_out_cache_loc_cpu(torch.tensor([[0, 2, -1], [3, -1, -1]]), torch.arange(10, 16), out)
    assert out.tolist() == [10, 12, 13, 0, 0, 0]


def test_the_bonus_token_is_the_last_accepted():
    out = torch.zeros(3, dtype=torch.int32)
    tokens = torch.tensor([[5, 6, 7], [8, 0, 0], [9, 4, 0]], dtype=torch.int32)
    cache.fill_bonus_tokens_cpu(tokens, torch.tensor([3, 1, 2]), out, 3)
    assert out.tolist() == [7, 8, 4]


def test_a_branch_may_end_at_the_last_position():
    rows, slots, seq_lens = table(2), torch.tensor([3, 1]), torch.tensor([WIDTH - 3, 5])
    branches = cache.build_draft_decode_metadata_cpu(rows, slots, seq_lens, 1, 3, WIDTH)
    assert branches[0].tolist() == rows[3].tolist() and branches[1, :8].tolist() == rows[1, :8].tolist()
