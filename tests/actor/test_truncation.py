"""actor/truncation.py: the kept tokens against a sorted vocabulary, on one rank; `test_logprob.py` has several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.actor.truncation import Truncation
from tests.support.truncation import truncate


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def kept(scores: torch.Tensor, top_k: int = -1, top_p: float = 1.0) -> torch.Tensor:
    return Truncation(top_k, top_p).kept(scores, dist.group.WORLD)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(2, 200),
    spread=st.floats(0.1, 8),
    top_k=st.integers(-1, 40).filter(bool),
    top_p=st.floats(0.05, 1),
)
def test_the_kept_tokens_are_those_of_a_sorted_vocabulary(seed, width, spread, top_k, top_p):
    logits = spread * torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    scores = logits - logits.amax(-1, keepdim=True)
    for row, mask in zip(scores, kept(scores, top_k, top_p), strict=True):
        probs = row.double().exp().numpy()
        ordered = np.sort(probs)[::-1][: top_k if top_k > 0 else width]
        nearest = np.abs(ordered.cumsum() / ordered.sum() - top_p).min()
        if nearest > 1e-5:  # nearer than this, float32 sums may fall on the other side
            assert mask.tolist() == (truncate(probs, top_k, top_p) > 0).tolist()


def test_equal_scores_are_kept_together():
    scores = torch.tensor([[0.0, -1.0, -1.0, -0.0, -5.0]])
    assert kept(scores, 1).tolist() == [[True, False, False, True, False]]
    assert kept(scores, 3).tolist() == [[True, True, True, True, False]]
    assert kept(scores, 4).tolist() == kept(scores, 3).tolist()
    half = float(scores[0, :4].exp()[[0, 3]].sum() / scores.exp().sum())
    assert kept(scores, -1, half - 1e-3).tolist() == kept(scores, 1).tolist()
    assert kept(scores, -1, half + 1e-3).tolist() == kept(scores, 3).tolist()


def test_padding_and_the_most_probable_token():
    scores = torch.tensor([[-30.0, 0.0, -1e30, -60.0]])
    assert kept(scores, -1, 1e-6).tolist() == [[False, True, False, False]]
    assert kept(scores, 3, 1.0).tolist() == [[True, True, False, True]]
    assert Truncation().keeps_all and Truncation(0, 1.0).keeps_all
    assert not Truncation(5).keeps_all and not Truncation(-1, 0.5).keeps_all


def test_a_token_at_the_very_edge_is_kept():
    """The engine keeps it too: the tokens before it hold exactly the share top_p. exp(-1e-8) is 1 in float32."""
    scores = torch.tensor([[0.0, -1e-8, -3.0]])
    assert kept(scores, 2, 0.5).tolist() == [[True, True, False]]
    assert kept(scores, 2, 0.499).tolist() == [[True, False, False]]


def test_a_share_that_rounds_to_all_keeps_what_top_k_kept():
    assert kept(torch.tensor([[0.0, -1.0, -2.0, -3.0]]), 2, 1 - 1e-12).tolist() == [[True, True, False, False]]
