"""What a crash of the machine leaves: the order in which checkpoint/store.py syncs, renames and removes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from respec_trainer.checkpoint.files import write_tensors, write_text
from respec_trainer.checkpoint.new_folder import new_folder
from respec_trainer.checkpoint.resume import restore_logs
from respec_trainer.checkpoint.store import begin, point, publish, retain, tidy
from tests.support.checkpoints import ToyRun, toy_config

META = {"step": 7, "tp": 1, "dp": 1, "zero": 1, "dtype": "fp32", "optimizer": True, "model": {}, "parameters": {}}
PID = os.getpid()


@pytest.fixture
def events(tmp_path, monkeypatch) -> list[tuple]:
    """All fsyncs, renames and removals of folders, in their order, by names within `tmp_path`."""
    seen: list[tuple] = []
    calls = {"fsync": os.fsync, "rename": os.rename, "rmtree": shutil.rmtree}

    def name(path) -> str:
        found = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else Path(path)
        return str(found.relative_to(tmp_path))

    def recorded(kind):
        def call(*paths, **options):
            seen.append((kind, *map(name, paths)))
            return calls[kind](*paths, **options)

        return call

    monkeypatch.setattr(os, "fsync", recorded("fsync"))
    monkeypatch.setattr(os, "rename", recorded("rename"))
    monkeypatch.setattr(shutil, "rmtree", recorded("rmtree"))
    return seen


POINTED = [("fsync", f".latest-{PID}"), ("rename", f".latest-{PID}", "latest"), ("fsync", ".")]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_has_it_before_latest_does(tmp_path, events):
    partial = begin(tmp_path, 7)
    (partial / "actor/tp0_dp0.safetensors").write_text("weights")
    (partial / "hf").mkdir()
    (partial / "hf/config.json").write_text("{}")
    events.clear()
    publish(partial, META, {})
    inside = ["actor", "actor/tp0_dp0.safetensors", "ranks", "hf", "hf/config.json"]
    content = {("fsync", f"{partial.name}/{name}") for name in inside} | {("fsync", partial.name)}
    assert set(events[: len(content)]) == content, "every file and folder, whoever wrote it"
    assert events[len(content) :] == [
        ("fsync", f"{partial.name}/meta.json"),
        ("fsync", partial.name),
        ("rename", partial.name, "step_7"),
        ("fsync", "."),
        *POINTED,
    ]


def test_latest_is_replaced_whole(tmp_path, events):
    (tmp_path / "step_3").mkdir()
    (tmp_path / "latest").write_text("step_2\n")
    (tmp_path / f".latest-{PID}").write_text("left by a crash")
    point(tmp_path / "step_3")
    assert events == POINTED
    assert (tmp_path / "latest").read_text() == "step_3\n"


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, events):
    for step in (1, 2, 3):
        (tmp_path / f"step_{step}").mkdir()
    (tmp_path / "latest").write_text("step_3\n")
    retain(tmp_path, newest=1, best=0, score=lambda path: None)
    assert events == [
        event
        for step in (2, 1)
        for event in (
            ("rename", f"step_{step}", f".step_{step}.dropped-{PID}"),
            ("rmtree", f".step_{step}.dropped-{PID}"),
        )
    ]


def test_what_is_left_of_an_earlier_process_goes_before_latest_moves(tmp_path, events):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_2").mkdir()
    for name in (".step_2.partial-77", ".step_1.dropped-77"):
        (tmp_path / name).mkdir()
    (tmp_path / ".latest-77").write_text("step_")
    tidy(tmp_path, tmp_path / "step_1")
    assert events == [
        ("rmtree", ".step_2.partial-77"),
        ("rmtree", ".step_1.dropped-77"),
        ("rename", "step_2", "step_2.damaged-1"),
        *POINTED,
    ]


def test_a_converted_folder_is_on_the_disk_before_it_has_its_name(tmp_path, events):
    with new_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub/file").write_text("content")
    scratch = f".out.partial-{PID}"
    inside = {("fsync", f"{scratch}/sub"), ("fsync", f"{scratch}/sub/file"), ("fsync", scratch)}
    assert set(events[:3]) == inside
    assert events[3:] == [("rename", scratch, "out"), ("fsync", "."), ("rmtree", scratch)]


def test_the_logs_are_on_the_disk_before_their_lengths_are(tmp_path, events):
    run = ToyRun(tmp_path / "run", toy_config(tmp_path, {"checkpoint.background": False}))
    events.clear()
    run.work(1)
    state = f"run/checkpoints/.step_1.partial-{PID}/state.json"
    assert events.index(("fsync", "run/metrics.jsonl")) < events.index(("fsync", state))


def test_a_log_that_was_cut_is_on_the_disk(tmp_path, events):
    (tmp_path / "metrics.jsonl").write_text("one\ntwo\n")
    restore_logs(tmp_path, tmp_path, {"metrics.jsonl": 4, "samples.jsonl": 0})
    assert events == [("fsync", "metrics.jsonl")]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "less than a buffer"),
        lambda path: write_text(path, "more" * 9999),
        lambda path: write_tensors(path, {"a": torch.zeros(10_000)}),
    ],
)
def test_a_file_is_on_the_disk_whole_when_its_facts_are_known(tmp_path, monkeypatch, write):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size) or fsync(handle))
    facts = write(tmp_path / "file")
    assert synced == [facts["bytes"]] == [(tmp_path / "file").stat().st_size]
