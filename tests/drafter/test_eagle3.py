"""drafter/eagle3.py: the unrolled drafter computes the same as serving, which goes one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from respec_trainer.drafter.eagle3 import Eagle3Drafter, shift_left, unrolled_attention
from respec_trainer.drafter.shape import DrafterShape
from tests.support.drafters import target_config, tiny_drafter

STEPS, LENGTH = 4, 9


def inputs(hidden=64, rows=2, length=LENGTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    embeddings = torch.randn(rows, length, hidden, generator=generator, dtype=dtype)
    return embeddings, torch.randn(rows, length, 3 * hidden, generator=generator, dtype=dtype)


class Serving:
    """The drafter as an engine runs it: one sequence, one position a call, a list of keys and values. Float64.

    Written from the format's description alone, with the checkpoint's tensors by name.
    """

    def __init__(self, drafter):
        self.w = {name: tensor.detach().double() for name, tensor in drafter.state_dict().items()}
        self.shape, self.cache = drafter.shape, []

    def norm(self, x, name):
        return x / torch.sqrt((x * x).mean() + self.shape.rms_norm_eps) * self.w[name + ".weight"]

    def rope(self, heads, position):
        half = self.shape.head_dim // 2
        out = heads.clone()
        for i in range(half):
            angle = position * self.shape.rope["rope_theta"] ** (-i / half)
            a, b = heads[:, i], heads[:, i + half]
            out[:, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def layer(self, embedding, feature, position):
        """The layer's output before the last norm; appends its keys and values to the cache."""
        w, d = self.w, self.shape.head_dim
        x = torch.cat([self.norm(embedding, "midlayer.input_layernorm"), self.norm(feature, "midlayer.hidden_norm")])
        q, k, v = ((w[f"midlayer.self_attn.{n}_proj.weight"] @ x).view(-1, d) for n in "qkv")
        self.cache.append((self.rope(k, position), v))
        q = self.rope(q, position)
        share = self.shape.num_attention_heads // self.shape.num_key_value_heads
        heads = []
        for head in range(self.shape.num_attention_heads):
            scores = torch.stack([q[head] @ key[head // share] / math.sqrt(d) for key, _ in self.cache])
            weights = scores.softmax(0)
            heads.append(sum(p * value[head // share] for p, (_, value) in zip(weights, self.cache, strict=True)))
        h = feature + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(heads)
        z = self.norm(h, "midlayer.post_attention_layernorm")
        gate, up = w["midlayer.mlp.gate_proj.weight"] @ z, w["midlayer.mlp.up_proj.weight"] @ z
        return h + w["midlayer.mlp.down_proj.weight"] @ (F.silu(gate) * up)

    def draft(self, embeddings, features, last, steps):
        """Logits of `steps` drafts after tokens x_0 .. x_{last+1}, features a_0 .. a_last; later x are as given."""
        self.cache = []
        for t in range(last + 1):  # prefill, or extension after a verification: features are the target's
            out = self.layer(embeddings[t + 1], self.w["fc.weight"] @ features[t], t)
        logits = [self.w["lm_head.weight"] @ self.norm(out, "norm")]
        for k in range(1, steps):  # decoding: the feature is the drafter's own output
            out = self.layer(embeddings[last + 1 + k], out, last + k)
            logits.append(self.w["lm_head.weight"] @ self.norm(out, "norm"))
        return torch.stack(logits)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_every_depth_and_position_equals_serving(family):
    drafter = tiny_drafter(target_config(family))
    embeddings, features = inputs()
    unrolled = [drafter.logits(hidden) for hidden in drafter.unroll(embeddings, features, STEPS)]
    serving = Serving(drafter)
    for row in range(len(embeddings)):
        for t in range(LENGTH - STEPS):
            expected = serving.draft(embeddings[row].double(), features[row].double(), t, STEPS)
            got = torch.stack([logits[row, t] for logits in unrolled]).double()
            # float32 against float64: logits are of order 1, and rounding errors add up over four layers.
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_the_last_positions_are_right_too_while_their_tokens_exist():
    drafter = tiny_drafter()
    embeddings, features = inputs(rows=1)
    for k, hidden in enumerate(drafter.unroll(embeddings, features, STEPS)):
        t = LENGTH - 2 - k  # x_{t+1+k} is the last token
        expected = Serving(drafter).draft(embeddings[0].double(), features[0].double(), t, k + 1)[k]
        torch.testing.assert_close(drafter.logits(hidden[0, t]).double(), expected, rtol=2e-5, atol=2e-5)


def test_padding_to_the_right_changes_nothing():
    drafter = tiny_drafter()
    embeddings, features = inputs()
    longer = [F.pad(x, (0, 0, 0, 5), value=3.0) for x in (embeddings, features)]
    pairs = zip(drafter.unroll(embeddings, features, STEPS), drafter.unroll(*longer, STEPS), strict=True)
    for k, (short, long) in enumerate(pairs):
        kept = LENGTH - 1 - k
        torch.testing.assert_close(short[:, :kept], long[:, :kept], rtol=1e-5, atol=1e-5)  # sums in another order


def attention_inputs(length=11):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    return draw(2, 4, length, 8), [(draw(2, 2, length, 8), draw(2, 2, length, 8)) for _ in range(3)]


def test_attention_equals_a_loop_over_queries():
    query, cache = attention_inputs()
    got = unrolled_attention(query, cache)
    for head in range(4):
        for t in range(query.shape[2]):
            seen = [(k[0, head // 2, : t + 1], v[0, head // 2, : t + 1]) for k, v in cache[:1]]
            seen += [(k[0, head // 2, t : t + 1], v[0, head // 2, t : t + 1]) for k, v in cache[1:]]
            keys, values = (torch.cat(part) for part in zip(*seen, strict=True))
            weights = (keys @ query[0, head, t] / math.sqrt(8)).softmax(0)
            # The weights pass through float32 inside.
            torch.testing.assert_close(got[0, head, t], weights @ values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [1, 4, 11])
def test_blocks_of_queries_change_neither_results_nor_gradients(block):
    query, cache = attention_inputs()
    leaves = [query, *(x for pair in cache for x in pair)]
    whole = unrolled_attention(query, cache)
    blocked = unrolled_attention(query, cache, block)
    torch.testing.assert_close(blocked, whole, rtol=1e-6, atol=1e-6)  # float32 inside
    seed = torch.linspace(-1, 1, whole.numel(), dtype=torch.float64).view_as(whole)
    for a, b in zip(torch.autograd.grad(whole, leaves, seed), torch.autograd.grad(blocked, leaves, seed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_reach_every_weight_and_no_later_token():
    drafter = tiny_drafter()
    embeddings, features = (x.requires_grad_() for x in inputs(rows=1))
    hidden = list(drafter.unroll(embeddings, features, STEPS))
    t, k = 3, 2
    drafter.logits(hidden[k][0, t]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in drafter.parameters())
    reached = embeddings.grad.abs().sum((0, 2)) > 0
    assert reached.tolist() == [False, *[True] * (t + 1 + k), *[False] * (LENGTH - t - k - 2)]  # x_1 .. x_{t+1+k}
    assert (features.grad.abs().sum((0, 2)) > 0).tolist() == [True] * (t + 1) + [False] * (LENGTH - t - 1)


def test_the_seed_alone_decides_the_initial_weights():
    shape = DrafterShape.for_target(target_config(), 64)
    torch.manual_seed(1)
    first = Eagle3Drafter(shape, seed=5).state_dict()
    state = torch.get_rng_state()
    second = Eagle3Drafter(shape, seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first["fc.weight"], Eagle3Drafter(shape, seed=6).fc.weight)


def test_bf16_runs_near_float32():
    drafter, (embeddings, features) = tiny_drafter(), inputs()
    exact = [drafter.logits(h) for h in drafter.unroll(embeddings, features, 3)]
    rounded = drafter.bfloat16()
    for k, (hidden, want) in enumerate(zip(rounded.unroll(embeddings, features, 3), exact, strict=True)):
        assert hidden.dtype == torch.bfloat16
        keep = LENGTH - 1 - k
        # bfloat16 keeps 8 bits; errors of 0.4 % a product add up over a layer a step.
        error = (rounded.logits(hidden).float() - want)[:, :keep].norm() / want[:, :keep].norm()
        assert error < 0.05


def test_shift_left():
    x = torch.arange(5).view(1, 5)
    assert shift_left(x, 2).tolist() == [[2, 3, 4, 0, 0]]
    assert shift_left(x, 0).tolist() == x.tolist()
    assert shift_left(x, 7).tolist() == [[0] * 5]
