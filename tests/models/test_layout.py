"""models/layout.py and rules.py: the cuts of a parameter, entry by entry."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respec_trainer.models.layout import Layout, Segment
from respec_trainer.models.names import Names
from respec_trainer.models.rules import columns, gate_and_up, head_dim, padded_vocab_size, qkv, replicated, vocabulary


def entries(segments) -> list[tuple[str | None, int]]:
    """List a layout's entries one by one: (source, index), (None, -1) for padding."""
    return [(s.source, s.start + i if s.source else -1) for s in segments for i in range(s.length)]


segments = st.lists(
    st.builds(Segment, st.sampled_from(["a", "b", "c", None]), st.integers(0, 9), st.integers(0, 7)), min_size=1
)


@given(segments, st.sampled_from([1, 2, 3, 4]))
def test_cuts_are_equal_parts_that_follow_each_other(parts, tp):
    layout = Layout(0, (*parts, Segment("rest", 0, -sum(part.length for part in parts) % tp)))
    whole = entries(layout.segments)
    share = len(whole) // tp
    for rank in range(tp):
        assert entries(layout.cut(rank, tp)) == whole[rank * share : (rank + 1) * share]
        assert all(part.length > 0 for part in layout.cut(rank, tp))


def test_extents_add_up_over_segments_and_leave_padding_out():
    parts = (Segment("a", 0, 3), Segment("b", 0, 2), Segment("a", 3, 4), Segment(None, 0, 9))
    assert Layout(0, parts).extents() == {"a": 7, "b": 2}
    assert Layout(None, (Segment("a", 0, 3),)).extents() == {}


CONFIG = SimpleNamespace(
    hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=3, vocab_size=10, intermediate_size=8
)


def test_queries_keys_and_values_are_ordered_by_group():
    layout = qkv(Names(), "weight")(CONFIG, 1, "layer.")
    names = [(segment.source.split(".")[2], segment.start, segment.length) for segment in layout.segments]
    first = [("q_proj", 0, 6), ("k_proj", 0, 3), ("v_proj", 0, 3)]
    assert names == [*first, ("q_proj", 6, 6), ("k_proj", 3, 3), ("v_proj", 3, 3)] and layout.dim == 0
    assert all(segment.source.startswith("layer.self_attn.") for segment in layout.segments)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gate_and_up_are_cut_alike(tp):
    layout, rows = gate_and_up(Names())(CONFIG, tp, "l."), 8 // tp
    for rank in range(tp):
        ours = range(rank * rows, (rank + 1) * rows)
        expected = [(f"l.mlp.{name}.weight", row) for name in ("gate_proj", "up_proj") for row in ours]
        assert entries(layout.cut(rank, tp)) == expected


@pytest.mark.parametrize(("tp", "padded"), [(1, 10), (2, 10), (3, 12), (4, 12), (10, 10), (16, 16)])
def test_the_vocabulary_is_padded_at_its_end(tp, padded):
    assert padded_vocab_size(CONFIG, tp) == padded
    layout = vocabulary("head.weight")(CONFIG, tp, "")
    assert entries(layout.segments) == [("head.weight", row) for row in range(10)] + [(None, -1)] * (padded - 10)
    assert all(segment.length for segment in layout.segments) and layout.dim == 0


def test_columns_are_cut_and_vectors_are_not():
    layout = columns("o.weight", lambda config: 12)(CONFIG, 2, "l.")
    assert (layout.dim, layout.segments) == (1, (Segment("l.o.weight", 0, 12),))
    assert replicated("norm.weight")(CONFIG, 2, "l.") == Layout(None, (Segment("l.norm.weight", 0, 12),))
    assert replicated("q_norm.weight", head_dim)(CONFIG, 2, "l.").segments[0].length == 3


def test_the_size_of_a_head_is_told_or_follows():
    assert head_dim(CONFIG) == 3
    sizes = {"hidden_size": 12, "num_attention_heads": 4}
    assert head_dim(SimpleNamespace(**sizes)) == head_dim(SimpleNamespace(**sizes, head_dim=None)) == 3
    assert head_dim(SimpleNamespace(**sizes, head_dim=8)) == 8
