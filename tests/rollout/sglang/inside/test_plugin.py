"""rollout/sglang/inside/plugin.py: its hooks, with stand-ins for sglang's objects."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from respec_trainer.rollout.plugin_contract import ORIGINS
from respec_trainer.rollout.sglang.inside.plugin import note_prefill, with_distinct_drafts, with_origins


def request(tokens: int, origins=None, finished=False, retracted=False):
    info = None if origins is None else {ORIGINS: list(origins)}
    return SimpleNamespace(
        output_ids=[5] * tokens, customized_info=info, is_retracted=retracted, finished=lambda: finished
    )


def passed(requests, runs, width: int):
    """Return the requests' lists of origins after a pass of `width` tokens."""
    result = SimpleNamespace(speculative_output_stride=None, speculative_num_draft_tokens=width)
    assert with_origins(lambda *_: runs, None, result, SimpleNamespace(reqs=requests)) is runs
    return [request.customized_info and request.customized_info[ORIGINS] for request in requests]


def test_a_pass_is_a_run_of_drafts_and_a_draw():
    requests = [request(1), request(4, [0, 1, 1, 2]), request(3, [0, 2])]
    assert passed(requests, [[7, 8, 9], [7], [7, 8]], width=4) == [[0, 1, 1, 2], [0, 1, 1, 2, 2], [0, 2, 0, 1, 2]]


def test_a_pass_without_drafts_is_no_speculation():
    assert passed([request(2, [0, 2]), request(1)], [[7], [7]], width=1) == [[0, 2, 0], [0, 0]]


def test_tokens_that_sglang_discards_are_not_recorded():
    requests = [request(2, [0, 2], finished=True), request(2, [0, 2], retracted=True), request(1)]
    assert passed(requests, [[7, 8], [7, 8], []], width=4) == [[0, 2], [0, 2], None]


@pytest.mark.parametrize(("algorithm", "expected"), [("NGRAM", {ORIGINS: [0, 1, 2, 0]}), (None, None)])
def test_a_token_without_a_verify_pass_is_recorded_before_it_is_sent(monkeypatch, algorithm, expected):
    """Such tokens are the first one, and the one after a retraction."""
    context = ModuleType("sglang.srt.runtime_context")
    context.get_spec = lambda: SimpleNamespace(speculative_algorithm=algorithm)
    for name, module in (("sglang", None), ("sglang.srt", None), ("sglang.srt.runtime_context", context)):
        monkeypatch.setitem(sys.modules, name, module or ModuleType(name))
    drawn = request(4, algorithm and [0, 1, 2])
    note_prefill(drawn, 1)
    assert drawn.customized_info == expected


def test_padding_of_ngram_trees_becomes_different_tokens():
    # Children of the root: 9, whose child is 0, and three nodes of padding. In the second tree 0 is also a real draft.
    parents = [[-1, 0, 1, 0, 0, 0], [-1, 0, 0, 0, 0, 0]]
    drafts = np.array([7, 9, 0, 0, 0, 0, 7, 1, 0, 3, 0, 0])
    mask = np.zeros((2, 6, 6), dtype=np.int64)
    for tree, row in zip(mask, parents, strict=True):
        for node, parent in enumerate(row):
            tree[node] = tree[parent] * (parent >= 0)
            tree[node, node] = 1
    before = mask.copy()
    tokens, same = with_distinct_drafts((drafts, mask.ravel()), SimpleNamespace(draft_token_num=6), None)
    assert tokens.tolist() == [7, 9, 0, 0, 1, 2, 7, 1, 0, 3, 2, 4]
    assert (same == before.ravel()).all()
