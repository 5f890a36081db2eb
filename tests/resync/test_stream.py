"""resync/stream.py: how tensors are divided into buckets. With an actor: tests/integration/resync/test_stream.py."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from respec_trainer.resync.stream import WholeStream, cut, flat_tensors, numel_of
from respec_trainer.resync.workspace import Workspace


@given(st.lists(st.integers(0, 12)), st.integers(0, 20))
@example([3, 4, 3], 10)
@example([11, 1], 10)
@example([1, 11], 10)
@example([], 10)
def test_a_bucket_is_at_most_the_limit_and_no_smaller_than_it_must_be(sizes, limit):
    parts = cut(range(len(sizes)), sizes, limit)
    assert [item for part in parts for item in part] == list(range(len(sizes))), "all, in order"
    held = [sum(sizes[item] for item in part) for part in parts]
    assert all(part for part in parts)
    assert all(size <= limit or len(part) == 1 for size, part in zip(held, parts, strict=True))
    following = [sizes[part[0]] for part in parts[1:]]
    assert all(size + after > limit for size, after in zip(held, following, strict=False)), "the next one had no room"


def test_tensors_of_every_rank_come_in_buckets_of_the_size_they_are_sent_in():
    named = [(str(i), torch.full((10,), float(i), dtype=torch.float64)) for i in range(5)]
    workspace = Workspace(torch.device("cpu"))
    stream = WholeStream(named, wanted=True, bucket_bytes=40, dtype=torch.bfloat16)  # 20 bytes each
    assert [list(bucket.shapes) for bucket in stream] == [["0", "1"], ["2", "3"], ["4"]]
    assert stream.shapes == {str(i): (10,) for i in range(5)} and numel_of(stream.shapes) == 50
    received = [pair for bucket in stream for pair in bucket.copy(workspace, f"bucket-{bucket.tensors[0][0]}")]
    assert [name for name, _ in received] == list("01234")
    for name, tensor in received:
        assert tensor.dtype == torch.bfloat16 and tensor.tolist() == [float(name)] * 10
    others = WholeStream(named, wanted=False, bucket_bytes=40, dtype=torch.bfloat16)
    assert [bucket.copy(workspace) for bucket in others] == [[], [], []] and others.shapes == stream.shapes


def test_tensors_of_a_bucket_lie_one_after_the_other():
    workspace = Workspace(torch.device("cpu"))
    out = flat_tensors({"a": (2, 3), "b": (), "c": (0, 4), "d": (5,)}, torch.float32, workspace, "flat")
    for name, value in zip("abcd", (1.0, 2.0, 3.0, 4.0), strict=True):
        out[name].fill_(value)
    assert workspace.take("flat", 12, torch.float32).tolist() == [1.0] * 6 + [2.0] + [4.0] * 5
    assert {name: tuple(tensor.shape) for name, tensor in out.items()} == {"a": (2, 3), "b": (), "c": (0, 4), "d": (5,)}
