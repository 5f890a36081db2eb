"""convert/verify.py: every difference is found, and logits equal those of transformers."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from respec_trainer.checkpoint.progress import Silent
from respec_trainer.checkpoint.tensors import open_tensors
from respec_trainer.convert.convert import to_megatron
from respec_trainer.convert.report import comparison_report, logits_line
from respec_trainer.convert.verify import compare, largest_difference, logits_of, sample_tokens
from respec_trainer.models.registry import FAMILIES
from respec_trainer.weights.hf_folder import HFFolder
from tests.support.models import tiny_model
from tests.support.saved_models import save_hf

QUIET = Silent()
NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def two(tmp_path):
    """Return two folders of the same weights, and a function that changes the second and compares."""
    folders = [save_hf(tmp_path / name, shards=1)[0] for name in ("first", "second")]

    def compared(edit):
        weights = load_file(folders[1] / "model.safetensors")
        edit(weights)
        save_file(weights, folders[1] / "model.safetensors")
        with HFFolder(folders[0]) as first, HFFolder(folders[1]) as second:
            return compare(first, second, QUIET)

    return compared


def test_equal_weights_are_equal(two):
    comparison = two(lambda weights: None)
    assert comparison.within(0)
    assert comparison.equal == comparison.common > 10
    assert comparison.differences == []


def test_one_bit_shows_and_by_how_much(two):
    comparison = two(lambda weights: weights[DOWN].view(torch.int32)[3, 5:6].bitwise_xor_(1))
    (difference,) = comparison.differences
    assert (difference.name, difference.what) == (DOWN, "values")
    assert 0 < difference.largest < 1e-6
    assert not comparison.within(0)
    assert not comparison.within(difference.largest / 2)
    assert comparison.within(difference.largest)
    assert comparison.equal == comparison.common - 1


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda weights: weights.pop(NORM), "only in .*first"),
        (lambda weights: weights.update({"model.more": torch.ones(1)}), "only in .*second"),
        (lambda weights: weights.update({NORM: torch.ones(32)}), r"shape: \[64\] and \[32\]"),
    ],
)
def test_what_cannot_be_compared_is_within_no_tolerance(two, edit, what):
    comparison = two(edit)
    (difference,) = comparison.differences
    assert difference.largest is None
    assert re.fullmatch(what, difference.what)
    assert not comparison.within(math.inf)


def test_dtypes_differ_though_values_agree(two):
    comparison = two(lambda weights: weights.update({NORM: weights[NORM].double()}))
    (difference,) = comparison.differences
    assert difference.what == "dtype: float32 and float64"
    assert difference.largest == 0
    assert comparison.within(1e-9)
    assert not comparison.within(0)


def test_not_a_number_is_within_no_tolerance(two):
    comparison = two(lambda weights: weights[NORM].fill_(math.nan))
    assert math.isnan(comparison.differences[0].largest)
    assert not comparison.within(math.inf)


def test_the_largest_difference_is_found_in_any_chunk(monkeypatch):
    monkeypatch.setattr("respec_trainer.convert.verify.CHUNK", 4)
    a, b = torch.zeros(10), torch.zeros(10)
    for place in (0, 5, 9):
        b[place] = 3
        assert largest_difference(a, b) == 3
        b[place] = math.nan
        assert math.isnan(largest_difference(a, b))
        b[place] = 0
    assert largest_difference(a, b) == 0


def test_a_head_is_missed_unless_embeddings_are_tied(two):
    assert [d.name for d in two(lambda weights: weights.pop("lm_head.weight")).differences] == ["lm_head.weight"]


def test_a_head_beside_tied_embeddings_is_not_missed(tmp_path):
    (first, _), (second, _) = (save_hf(tmp_path / name, tied=True, shards=1) for name in ("first", "second"))
    weights = load_file(second / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights[EMBEDDING].clone()}, second / "model.safetensors")
    with HFFolder(first) as a, HFFolder(second) as b:
        assert compare(a, b, QUIET, tied=True).within(0)
        assert not compare(a, b, QUIET).within(0)


@pytest.mark.parametrize(("family", "tied"), itertools.product(FAMILIES, (False, True)))
def test_logits_are_transformers_own_from_either_kind_of_folder(tmp_path, family, tied):
    source, config = save_hf(tmp_path / "hf", family, tied)
    to_megatron(source, config, tmp_path / "megatron", 4, None, QUIET)
    tokens = sample_tokens(config, 12)
    with torch.no_grad():
        expected = tiny_model(config)(tokens).logits
    for folder in (source, tmp_path / "megatron"):
        with open_tensors(folder, config) as tensors:
            assert torch.equal(logits_of(tensors, config, tokens), expected)


def test_the_report_puts_the_worst_first(two):
    def edit(weights):
        weights[NORM] += 0.5
        weights[DOWN] += 2
        weights.pop("lm_head.weight")

    comparison = two(edit)
    table = comparison_report(comparison, 0.0).renderables[1]
    assert list(table.columns[0].cells) == ["lm_head.weight", DOWN, NORM]


def test_logits_are_judged():
    first = torch.zeros(2, 3, 5)
    second = first.clone()
    second[0, 0, 4] = 0.25
    text, equal = logits_line(first, second, 0.0)
    assert not equal
    assert "largest difference 0.25" in text
    assert "83.3%" in text
    assert logits_line(first, second, 0.1)[1]
    assert logits_line(first, first, 0.0)[1]
    assert not logits_line(first, second * math.nan, 0.1)[1]
    assert not logits_line(first, second[..., :4], 0.1)[1]
