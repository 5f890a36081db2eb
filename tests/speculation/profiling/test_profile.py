"""speculation/profiling/profile.py and shape.py: files that load, runs that match, and errors that name the field."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.profiling.profile import Cell, Timing, load_profile, shapes_digest
from respec_trainer.speculation.shape import OFF, Shape, chain, parse_shape
from tests.support.speculation import CPU, IDENTITY, profile_of


def test_a_profile_comes_back_from_its_file(tmp_path):
    profile = profile_of(CPU, noise=0.1, batches=(1, 4), contexts=(128,))
    profile.save(tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert profile.cell(4, 128, chain(3)).batch == 4 and profile.cell(4, 129, chain(3)) is None
    assert profile.shapes() == [chain(steps) for steps in (1, 2, 3, 5)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree["identity"].pop("tp"), "identity.tp: Field required"),
        (lambda tree: tree.update(graph_sizes=[1, 4, 2]), r"graph_sizes: \[1, 4, 2\] must rise"),
        (lambda tree: tree.update(graph_sizes=[0]), "graph_sizes.0: .* greater than or equal to 1"),
        (lambda tree: tree["cells"][0].update(batch=0), "cells.0.batch: .* greater than or equal to 1"),
        (lambda tree: tree["cells"][0]["times"]["plain"].update(seconds=[]), "cells.0.times.plain.seconds: .* 1 item"),
        (lambda tree: tree["cells"][0]["times"]["plain"].update(seconds=[-1.0]), "seconds.0: .* greater than 0"),
        (lambda tree: tree["cells"][0].update(times={}), "cells.0: times: none are given"),
        (lambda tree: tree["cells"][1]["times"].pop("verify"), "cells.1: times: verify required"),
        (lambda tree: tree["cells"][1]["times"].update(plain={"seconds": [1]}), "steps=1 has no part 'plain', only"),
        (lambda tree: tree["cells"][1].update(shape=[2, 1, 9]), "drafts only 2 tokens, and cannot verify 8"),
        (
            lambda tree: tree["cells"].append(tree["cells"][0]),
            "cells.5: batch=1, context=128, shape=off is there twice",
        ),
    ],
)
def test_malformed_profiles_name_the_field(tmp_path, change, words):
    tree = json.loads(profile_of(CPU, batches=(1,), contexts=(128,)).model_dump_json())
    change(tree)
    (tmp_path / "p.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=words):
        load_profile(tmp_path / "p.json")


def test_a_profile_of_an_earlier_version_names_no_graphs(tmp_path):
    """It is read as of an engine without any."""
    tree = json.loads(profile_of(CPU, batches=(1,), contexts=(128,), graphs=(1, 2, 4)).model_dump_json())
    (tmp_path / "p.json").write_text(json.dumps(tree))
    assert load_profile(tmp_path / "p.json").graph_sizes == [1, 2, 4]
    del tree["graph_sizes"]
    (tmp_path / "p.json").write_text(json.dumps(tree))
    assert load_profile(tmp_path / "p.json").graph_sizes == []


def test_files_that_are_not_there_or_not_json(tmp_path):
    with pytest.raises(ConfigError, match="no profile at"):
        load_profile(tmp_path / "absent.json")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(ConfigError, match="not a profile:\n.*Invalid JSON"):
        load_profile(tmp_path / "p.json")


def test_a_profile_of_something_else_is_refused():
    profile = profile_of(CPU, batches=(1,), contexts=(128,))
    profile.check_fits(IDENTITY)
    other = IDENTITY.model_copy(update={"versions": IDENTITY.versions | {"torch": "2.14.1"}, "threads": 2})
    with pytest.raises(ConfigError) as caught:
        profile.check_fits(other, "p.json")
    assert "threads: measured with 1, the run has 2" in str(caught.value)
    assert "versions.torch: measured with '2.13.0', the run has '2.14.1'" in str(caught.value)
    assert "sglang" not in str(caught.value)
    for field, value in (("device", "H100"), ("model", "0"), ("drafter", "0"), ("dtype", "fp32"), ("tp", 2)):
        with pytest.raises(ConfigError, match=f"{field}: measured with"):
            profile.check_fits(IDENTITY.model_copy(update={field: value}))


def test_median_and_spread():
    timing = Timing(seconds=[1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.median == 3.0 and timing.spread == pytest.approx(2 / 3)
    assert Timing(seconds=[2.0]).spread == 0.0


def test_a_whole_cycle_counts_where_it_was_measured():
    one = Timing(seconds=[1.0])
    parts = {"draft": one, "verify": one, "extend": one}
    assert Cell(batch=1, context=1, shape=chain(2), times=parts).seconds == 3.0
    assert Cell(batch=1, context=1, shape=chain(2), times=parts | {"cycle": Timing(seconds=[3.5])}).seconds == 3.5


def test_digests_depend_on_shapes_alone():
    config = {"hidden_size": 64, "num_hidden_layers": 2, "_name_or_path": "a"}
    assert shapes_digest(config) == shapes_digest(config | {"_name_or_path": "b", "eos_token_id": 3})
    assert shapes_digest(config) == shapes_digest(config | {"num_experts": None}), "as transformers writes it"
    assert shapes_digest(config) != shapes_digest(config | {"hidden_size": 128})


@given(st.integers(1, 9), st.integers(1, 9))
def test_shapes(steps, topk):
    drafted = topk + (steps - 1) * topk**2
    assert Shape(steps, topk, drafted + 1).fault() is None
    assert "drafts only" in Shape(steps, topk, drafted + 2).fault()
    assert chain(steps).is_chain and chain(steps).fault() is None and str(chain(steps)) == f"{steps},1,{steps + 1}"


def test_plain_decoding_is_a_shape():
    assert chain(0) == OFF and OFF.fault() is None and OFF.is_chain and str(OFF) == "off"
    assert "plain decoding" in Shape(0, 1, 4).fault() and "needs" in Shape(1, 0, 2).fault()


def test_shapes_on_the_command_line():
    assert parse_shape("3,2,6") == Shape(3, 2, 6) and parse_shape("3, 1, 4") == chain(3)
    for text in ("3,2", "3,2,x", "", "3,2,6,1"):
        with pytest.raises(ConfigError, match="is not steps,topk,draft_tokens"):
            parse_shape(text)
    with pytest.raises(ConfigError, match="3,2,99: .* drafts only"):
        parse_shape("3,2,99")


def test_cells_of_prompts_only_and_of_whole_cycles_only():
    one = Timing(seconds=[1.0])
    prompts = Cell(batch=1, context=1, shape=OFF, times={"prefill": one, "catch_up": one})
    assert not prompts.decodes and Cell(batch=1, context=1, shape=OFF, times={"plain": one}).decodes
    tree = Cell(batch=1, context=1, shape=Shape(3, 2, 6), times={"cycle": one})
    assert tree.decodes and tree.seconds == 1.0
