"""hosts.py on one rank: which facts are compared, and how differences are told. On several: tests/integration."""

from __future__ import annotations

import platform
import socket
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch.distributed as dist

from respec_trainer.errors import ConfigError
from respec_trainer.hosts import (
    LIBRARIES,
    HostFacts,
    check_hosts,
    check_shared_folder,
    code_digest,
    differences,
    engine_host_differences,
)

LIBRARY_VERSIONS = tuple((name, "1.0") for name in LIBRARIES)
NODE0 = HostFacts("node0", "3.11.7", LIBRARY_VERSIONS, "abc", 8, 8)
OLD_TORCH = (("torch", "0.9"), *LIBRARY_VERSIONS[1:])


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_facts_are_this_host_s(monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "5")
    facts = HostFacts.here()
    assert (facts.host, facts.python, facts.ranks) == (socket.gethostname(), platform.python_version(), 5)
    assert dict(facts.libraries) == {name: version(name) for name in LIBRARIES}
    assert facts.code == code_digest() and facts.gpus >= 0


def test_a_library_that_is_absent_is_told(monkeypatch):
    monkeypatch.setattr("respec_trainer.hosts.LIBRARIES", ("torch", "no-such-library"))
    assert HostFacts.here().libraries == (("torch", version("torch")), ("no-such-library", "not installed"))


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"python": "3.12.1"}, "python: 3.11.7 on node0 (rank 0), 3.12.1 on node1 (rank 1)"),
        ({"libraries": OLD_TORCH}, "torch: 1.0 on node0 (rank 0), 0.9 on node1 (rank 1)"),
        ({"libraries": LIBRARY_VERSIONS[:-1]}, "megatron-core: 1.0 on node0 (rank 0), None on node1 (rank 1)"),
        ({"code": "xyz"}, "respec_trainer's files (digest): abc on node0 (rank 0), xyz on node1 (rank 1)"),
        ({"gpus": 4}, "GPUs seen: 8 on node0 (rank 0), 4 on node1 (rank 1)"),
        ({"ranks": 4}, "ranks of a host: 8 on node0 (rank 0), 4 on node1 (rank 1)"),
    ],
)
def test_each_fact_is_compared(other, line):
    assert differences([NODE0, replace(NODE0, host="node1", **other)]) == [line]


def test_ranks_are_listed_by_value_and_host():
    facts = [NODE0, NODE0, replace(NODE0, host="node1", ranks=4), replace(NODE0, host="node2", ranks=4)]
    assert differences(facts) == ["ranks of a host: 8 on node0 (ranks 0, 1), 4 on node1 (rank 2) and node2 (rank 3)"]
    assert differences([NODE0, replace(NODE0, host="node1")]) == differences([NODE0]) == []


def test_a_host_of_engines_may_have_other_numbers_of_gpus_and_ranks_only():
    host = replace(NODE0, host="node9", gpus=1, ranks=1)
    assert engine_host_differences(NODE0, host) == []
    host = replace(host, python="3.12.1", libraries=OLD_TORCH)
    assert engine_host_differences(NODE0, host) == [
        "python: 3.11.7 on node0, which trains, 3.12.1 on node9",
        "torch: 1.0 on node0, which trains, 0.9 on node9",
    ]


def test_the_remedy_is_told_with_all_differences(monkeypatch):
    check_hosts(None, NODE0)
    two = [NODE0, replace(NODE0, host="node1", python="3.12.1", gpus=4)]
    monkeypatch.setattr("respec_trainer.hosts.gather", lambda mine, group: two)
    with pytest.raises(ConfigError, match=r"not alike:\n  python: .*\n  GPUs seen: .*\ninstall the same versions"):
        check_hosts(None)


def test_a_folder_is_made_seen_and_left_empty(alone, tmp_path):
    check_shared_folder(tmp_path / "a/runs", None, seconds=0.0)
    check_shared_folder(tmp_path / "a/runs", None, seconds=0.0)
    assert list((tmp_path / "a/runs").iterdir()) == []


def test_a_folder_where_the_file_does_not_appear_is_named(alone, tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    monkeypatch.setattr("pathlib.Path.touch", lambda path: None)  # a network file system that shows it to nobody
    words = f"run.dir: {folder} is not one folder for all ranks: .* did not appear to rank 0 on .* within 0 s"
    with pytest.raises(ConfigError, match=words):
        check_shared_folder(folder, None, seconds=0.3)


def test_a_folder_that_cannot_be_written_is_named(alone, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"run.dir: rank 0 cannot write in {tmp_path}/file/runs"):
        check_shared_folder(tmp_path / "file/runs", None, seconds=0.0)


def test_the_code_digest_sees_the_names_and_contents_of_all_python_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("x")
    seen = {code_digest(tmp_path)}
    (tmp_path / "notes.txt").write_text("y")
    assert code_digest(tmp_path) in seen, "other files are not code"
    for change in (
        lambda: (tmp_path / "sub/b.py").write_text("y"),
        lambda: (tmp_path / "sub/b.py").write_text("z"),
        lambda: (tmp_path / "a.py").rename(tmp_path / "c.py"),
        lambda: (tmp_path / "c.py").write_text(""),
        lambda: (tmp_path / "c.py").unlink(),
    ):
        change()
        assert code_digest(tmp_path) not in seen
        seen.add(code_digest(tmp_path))


def test_the_code_digest_does_not_depend_on_where_the_code_lies(tmp_path, monkeypatch):
    for place in ("one", "two"):
        (tmp_path / place / "sub").mkdir(parents=True)
        for name in ("b.py", "a.py", "sub/c.py") if place == "one" else ("sub/c.py", "a.py", "b.py"):
            (tmp_path / place / name).write_text(name)
    digest = code_digest(tmp_path / "one")
    assert code_digest(tmp_path / "two") == digest
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: reversed(list(rglob(folder, pattern))))
    assert code_digest(tmp_path / "one") == digest, "nor on the order in which a file system lists it"
