"""sgl_kernel/attention.py against plain softmax attention, request by request."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.rollout.sglang.inside.cpu import put_stand_in_on_path

put_stand_in_on_path()
from sgl_kernel import attention  # noqa: E402

DIM, SCALE = 8, 0.3
REST = (0.0, False, 0, None, None)  # no capped logits, cross attention, window, encoder, sinks


class Case:
    """Requests of the given lengths, whose cache rows are in random order."""

    def __init__(self, lengths, new, kv_heads, group, seed, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.new = torch.tensor(lengths), torch.tensor(new)
        rows = torch.randperm(sum(lengths) + 5, generator=generator)
        self.req_to_token = torch.zeros(len(lengths) + 2, max(lengths) + 3, dtype=torch.int32)
        self.slots = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
        taken = 0
        for slot, length in zip(self.slots.tolist(), lengths, strict=True):
            self.req_to_token[slot, :length] = rows[taken : taken + length]
            taken += length
        self.k, self.v = torch.randn(2, len(rows), kv_heads, DIM, generator=generator).to(dtype)
        self.q = torch.randn(sum(new), kv_heads * group, DIM, generator=generator).to(dtype)
        self.group = group

    def expected(self, sees) -> torch.Tensor:
        """Compute attention in float64. sees(request, new token, position) -> bool is the mask."""
        out, token = [], 0
        for request, (length, new) in enumerate(zip(self.lengths.tolist(), self.new.tolist(), strict=True)):
            rows = self.req_to_token[self.slots[request], :length].long()
            for step in range(new):
                visible = [position for position in range(length) if sees(request, step, position)]
                keys = self.k[rows[visible]].double().repeat_interleave(self.group, 1)
                values = self.v[rows[visible]].double().repeat_interleave(self.group, 1)
                weights = (torch.einsum("hd,lhd->hl", self.q[token].double(), keys) * SCALE).softmax(-1)
                out.append(torch.einsum("hl,lhd->hd", weights, values))
                token += 1
        return torch.stack(out)

    def causal(self, request, step, position) -> bool:
        return position <= self.lengths[request] - self.new[request] + step


@st.composite
def cases(draw, one_token=False, most=20):
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=5))
    new = [1 if one_token else draw(st.integers(1, min(length, most))) for length in lengths]
    return Case(lengths, new, draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 99)))


def close(actual, expected, atol=1e-5):  # float32 sums of at most 24 terms of magnitude 1
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=0)


@settings(max_examples=40, deadline=None)
@given(cases(one_token=True))
def test_decode(case):
    plan = attention.plan_decode(case.req_to_token, case.slots, case.lengths)
    close(attention.attend(plan, case.q, case.k, case.v, SCALE), case.expected(lambda *_: True))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_extend(case):
    plan = attention.plan_extend(case.req_to_token, case.slots, case.lengths, case.new, case.group)
    close(attention.attend(plan, case.q, case.k, case.v, SCALE), case.expected(case.causal))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(5, 20), min_size=1, max_size=4), st.sampled_from([1, 5]), st.integers(1, 3), st.integers(0, 99)
)
def test_extend_with_a_tree_mask(lengths, n, group, seed):
    case = Case(lengths, [n] * len(lengths), 2, group, seed)
    generator = torch.Generator().manual_seed(seed)
    tree = torch.rand(len(lengths), n, n, generator=generator) < 0.5
    tree |= torch.eye(n, dtype=torch.bool)
    plan = attention.plan_extend(case.req_to_token, case.slots, case.lengths, case.new, group, tree.flatten())

    def sees(request, step, position):
        first = lengths[request] - n
        return position < first or bool(tree[request, step, position - first])

    close(attention.attend(plan, case.q, case.k, case.v, SCALE), case.expected(sees))


def test_operators_store_and_write_in_place():
    case = Case([7, 3], [1, 1], 2, 2, seed=1)
    rows = case.req_to_token[case.slots, case.lengths - 1].long()
    k, v = torch.randn(2, 2, 2, DIM)
    out = torch.empty_like(case.q)
    plan = (case.req_to_token, case.slots, case.lengths)
    attention.decode_attention_cpu(case.q, case.k, case.v, 1.0, 1.0, out, k, v, rows, None, *plan, SCALE, *REST)
    torch.testing.assert_close(case.k[rows], k, atol=0, rtol=0)
    torch.testing.assert_close(case.v[rows], v, atol=0, rtol=0)
    close(out, case.expected(lambda *_: True))
    case = Case([7, 3], [4, 2], 2, 2, seed=2)
    out = torch.empty_like(case.q)
    plan = (case.req_to_token, case.slots, case.lengths, case.new, torch.tensor([0, 4]), 4)
    cache = (case.k, case.v, 1.0, 1.0)
    attention.extend_attention_cpu(case.q, None, None, out, *cache, *plan, SCALE, *REST, None, True)
    close(out, case.expected(case.causal))


def test_bfloat16_attention_is_computed_in_float32():
    case = Case([30, 9], [4, 4], 2, 3, seed=3, dtype=torch.bfloat16)
    plan = attention.plan_extend(case.req_to_token, case.slots, case.lengths, case.new, case.group)
    actual = attention.attend(plan, case.q, case.k, case.v, SCALE)
    assert actual.dtype == torch.bfloat16
    close(actual, case.expected(case.causal), atol=1e-2)  # rounding of the result: 2^-9 of values up to 3


def test_unsupported_arguments_are_refused():
    case = Case([3], [1], 1, 1, seed=0)
    plan = (case.req_to_token, case.slots, case.lengths)
    call = (case.q, case.k, case.v, 1.0, 1.0, case.q, None, None, None, None, *plan, SCALE)
    with pytest.raises(NotImplementedError, match="sliding"):
        attention.decode_attention_cpu(*call, 0.0, False, 4, None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_cap": 0.5},
        {"is_cross_attention": True},
        {"sliding_window": 1},
        {"sinks": torch.zeros(1)},
        {"k_scale": 2.0},
        {"v_scale": 0.5},
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes):
    plain = {"logit_cap": 0.0, "is_cross_attention": False, "sliding_window": -1, "sinks": None}
    given = plain | {"k_scale": 1.0, "v_scale": 1.0} | changes
    for function in (attention.decode_attention_cpu, attention.extend_attention_cpu):
        names = inspect.signature(function).parameters
        with pytest.raises(NotImplementedError, match="plain causal attention only"):
            function(**(dict.fromkeys(names) | given))
    names = inspect.signature(attention.extend_attention_cpu).parameters
    with pytest.raises(NotImplementedError, match="causal models only"):
        attention.extend_attention_cpu(
            **(dict.fromkeys(names) | plain | {"k_scale": 1, "v_scale": 1, "is_causal": False})
        )
