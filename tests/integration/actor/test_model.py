"""The policy model against transformers' on the same weights, in fp32, for every family."""

from __future__ import annotations

import itertools

import pytest

from respec_trainer.models.registry import FAMILIES
from tests.support.models import save_tiny_model, tiny_config
from tests.support.olive import olive_known
from tests.support.policy_errors import check_errors, worst_errors
from tests.support.processes.ranks import run_ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Make folders by (family, tied), with a vocabulary of 131, which no tp divides, in two files."""
    made = {}
    for family, tied in itertools.product(FAMILIES, (False, True)):
        folder = tmp_path_factory.mktemp(f"{family}-{tied}")
        made[family, tied] = save_tiny_model(folder, tiny_config(family, tied), shards=2)
    return made


def test_one_rank_equals_transformers(models):
    cases = [(model, False, recompute) for model in models.values() for recompute in (False, True)]
    check_errors(run_ranks(1, worst_errors, cases))


def test_two_ranks_equal_transformers(models):
    variants = [(False, False), (True, False), (True, True)]
    check_errors(run_ranks(2, worst_errors, [(model, *variant) for model in models.values() for variant in variants]))


def test_more_ranks_than_key_value_heads_equal_transformers(models):
    check_errors(run_ranks(4, worst_errors, [(models[family, False], True, False) for family in FAMILIES]))


def olive_errors(cases):
    with olive_known():
        return worst_errors(cases)


def test_a_made_up_family_equals_transformers(tmp_path):
    """tests/models/test_new_family.py shows the other uses of a family."""
    with olive_known():
        folder = save_tiny_model(tmp_path, tiny_config("olive"))
    check_errors(run_ranks(1, olive_errors, [(folder, False, False)]))


def test_scaled_rope_equals_transformers(tmp_path):
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
    for name, rope in (("llama3", scaled), ("linear", linear)):
        config = tiny_config("llama", rope_parameters=rope)
        check_errors(run_ranks(1, worst_errors, [(save_tiny_model(tmp_path / name, config), False, False)]))
