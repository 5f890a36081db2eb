"""sgl_kernel/tree.py against trees that are built and walked node by node."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.rollout.sglang.inside.cpu import put_stand_in_on_path

put_stand_in_on_path()
from sgl_kernel import tree  # noqa: E402


def random_draft(topk: int, steps: int, n: int, generator) -> tuple[list[int], list[int]]:
    """Return (parents, selected candidates) as EAGLE makes them: a path's scores multiply, and the n - 1 best stay."""
    scores = torch.rand(topk, generator=generator).sort(descending=True).values
    all_scores, frontier = [scores], scores
    candidates = torch.arange(topk)  # numbers of the frontier's nodes
    parents = [-1, *candidates.tolist()]
    for step in range(1, steps):
        children = frontier[:, None] * torch.rand(topk, topk, generator=generator)
        all_scores.append(children.flatten())
        best = children.flatten().topk(topk)
        frontier = best.values
        candidates = topk + (step - 1) * topk * topk + best.indices
        if step < steps - 1:
            parents += candidates.tolist()
    selected = torch.cat(all_scores).topk(n - 1).indices.sort().values
    return parents if steps > 1 else [], selected.tolist()


def naive_parents(parents: list[int], selected: list[int], topk: int) -> list[int]:
    """Return every node's parent node, -1 for the root."""
    nodes = [-1]
    for candidate in selected:
        expansion = candidate // topk
        nodes.append(0 if expansion == 0 else 1 + selected.index(parents[expansion]))
    return nodes


def build(parents, selected, seq_lens, topk, steps, n):
    batch = len(seq_lens)
    mask = torch.ones(batch * n * n, dtype=torch.bool)
    positions = torch.empty(batch * n, dtype=torch.int64)
    links = torch.full((3, batch, n), -1)
    arguments = torch.tensor(parents), torch.tensor(selected), torch.tensor(seq_lens), mask, positions, *links
    tree.build_tree_kernel_efficient_cpu(*arguments, topk, steps, n, tree.QLEN_ONLY)
    return mask.view(batch, n, n), positions.view(batch, n), *links


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999), st.data())
def test_build(topk, steps, batch, seed, data):
    most = topk + (steps - 1) * topk * topk
    n = steps + 1 if topk == 1 else data.draw(st.integers(min(steps + 1, most + 1), most + 1))
    generator = torch.Generator().manual_seed(seed)
    drafts = [random_draft(topk, steps, n, generator) for _ in range(batch)]
    seq_lens = list(range(3, 3 + batch))
    parents, selected = zip(*drafts, strict=True)
    mask, positions, index, child, sibling = build(parents, selected, seq_lens, topk, steps, n)
    assert index.tolist() == [[b * n + i for i in range(n)] for b in range(batch)]
    for b in range(batch):
        nodes = naive_parents(*drafts[b], topk)
        for i in range(n):
            path, node = [], i
            while node != -1:
                path.append(node)
                node = nodes[node]
            assert mask[b, i].nonzero().flatten().tolist() == sorted(path)
            assert positions[b, i] == seq_lens[b] + len(path) - 1
            children = [j for j in range(n) if nodes[j] == i]
            assert child[b, i] == (children or [-1])[0]
            for older, younger in pairwise([*children, -1]):
                assert sibling[b, older] == younger
        assert sibling[b, 0] == -1


def test_other_masks_are_refused():
    with pytest.raises(NotImplementedError, match="QLEN_ONLY"):
        tree.build_tree_kernel_efficient_cpu(*[None] * 8, 1, 3, 4, 0)


def random_links(n: int, generator) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    nodes = [-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, n)]
    child, sibling = torch.full((2, n), -1)
    for i in range(n):
        children = [j for j in range(n) if nodes[j] == i]
        if children:
            child[i] = children[0]
            sibling[children] = torch.tensor([*children[1:], -1])
    return nodes, child, sibling


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.booleans(), st.integers(0, 999))
def test_greedy_verification(n, batch, chain, seed):
    generator = torch.Generator().manual_seed(seed)
    trees = [random_links(n, generator) for _ in range(batch)]
    if chain:
        line = torch.tensor([*range(1, n), -1])
        trees = [([*range(-1, n - 1)], line, torch.full((n,), -1))] * batch
    candidates, target = torch.randint(0, 3, (2, batch, n), generator=generator)
    width = min(n, 4)
    predicts = torch.zeros(batch * n, dtype=torch.int32)
    accept_index = torch.full((batch, width), -1, dtype=torch.int32)
    count = torch.empty(batch, dtype=torch.int32)
    index = torch.arange(batch * n).view(batch, n)
    links = [torch.stack([t[i] for t in trees]) for i in (1, 2)]
    tree.verify_tree_greedy_cpu(predicts, accept_index, count, candidates, index, *links, target)
    for b, (nodes, _, _) in enumerate(trees):
        path = [0]
        while len(path) < width:
            good = [j for j in range(n) if nodes[j] == path[-1] and candidates[b, j] == target[b, path[-1]]]
            if not good:
                break
            path.append(good[0])
        assert count[b] == len(path) - 1
        assert accept_index[b].tolist() == [b * n + i for i in path] + [-1] * (width - len(path))
        assert [predicts[b * n + i] for i in path] == [target[b, i] for i in path]


@pytest.mark.parametrize("parents", [[[-1, 0, 0, 1, 1, 2], [-1, 0, 1, 2, 3, 4]], [[-1, 0, 0, 0, 0, 0]]])
def test_a_tree_given_as_a_mask(parents):
    from sgl_kernel.speculative import reconstruct_indices_from_tree_mask

    batch, n = len(parents), len(parents[0])
    mask = torch.zeros(batch, n, n, dtype=torch.bool)
    for tree_mask, row in zip(mask, parents, strict=True):
        for node, parent in enumerate(row):
            if parent >= 0:
                tree_mask[node] = tree_mask[parent]
            tree_mask[node, node] = True
    prefix = torch.arange(10, 10 + batch)
    positions = torch.zeros(batch * n + 3, dtype=torch.int64)  # buffers are longer than needed
    index, child, sibling = torch.zeros(3, batch, n, dtype=torch.int64)
    longer = torch.cat([mask.flatten(), torch.ones(5, dtype=torch.bool)])
    reconstruct_indices_from_tree_mask(longer, prefix, positions, index, child, sibling, batch, n)
    assert positions[batch * n :].tolist() == [0] * 3
    assert index.flatten().tolist() == list(range(batch * n))
    for b, row in enumerate(parents):
        for node in range(n):
            children = [other for other in range(n) if row[other] == node]
            siblings = [other for other in range(node + 1, n) if row[node] >= 0 and row[other] == row[node]]
            assert child[b, node] == (children or [-1])[0] and sibling[b, node] == (siblings or [-1])[0]
            assert positions[b * n + node] == 10 + b + mask[b, node].sum() - 1


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_no_more_drafts_are_accepted_than_there_is_room_for(width):
    """A chain of four right drafts after the root, and room for `width` nodes."""
    index = torch.arange(5)[None]
    accept_index = torch.full((1, width), -1)
    count = tree.accept_chain(accept_index, index, torch.ones(1, 4, dtype=torch.bool))
    assert count.tolist() == [width - 1] and accept_index.tolist() == [list(range(width))]
