"""watchdog/watchdog.py before it starts, and watchdog/ending.py: refusals, the reporting rank, the cause of errors."""

from __future__ import annotations

import socket
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from respec_trainer.config import RunConfig
from respec_trainer.errors import CheckpointError, ConfigError
from respec_trainer.network import free_port
from respec_trainer.watchdog import Watchdog
from respec_trainer.watchdog.ending import Reporter, kill_lost, lost_contact, main_stack
from respec_trainer.watchdog.messages import Process

RUN = RunConfig(name="watched", steps=1)


def test_an_occupied_port_is_named(monkeypatch):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=f"UDP port {port}.*--master_port ANOTHER"):
            Watchdog(RUN, rank=0, world_size=2, watched=2)


def test_ranks_without_a_launcher_are_refused(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR not set; start with `deepspeed"):
        Watchdog(RUN, rank=1, world_size=2, watched=2)
    monkeypatch.setenv("MASTER_ADDR", "no host of this name.invalid")
    with pytest.raises(ConfigError, match="is no known host"):
        Watchdog(RUN, rank=1, world_size=2, watched=2)


def test_one_rank_of_a_host_reports():
    first, second, other = Reporter("run 1"), Reporter("run 1"), Reporter("run 2")
    assert [one.is_me() for one in (first, second, first, other)] == [True, False, True, True]
    first.claim.close()
    assert second.is_me()


def test_only_lost_connections_are_others_faults():
    assert lost_contact(dist.DistNetworkError("closed"))
    assert lost_contact(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed"))
    wrapped = CheckpointError("saving failed")
    wrapped.__cause__ = dist.DistNetworkError("closed")
    assert lost_contact(wrapped) and not lost_contact(CheckpointError("saving failed"))
    assert not lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not lost_contact(OSError())


def test_only_lost_processes_of_this_machine_are_killed():
    me = Process.this()
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    lost = [replace(me, pid=child.pid, born=psutil.Process(child.pid).create_time()) for child in children]
    try:
        kill_lost([me, lost[0], replace(lost[1], home="another machine")], me)
        assert children[0].wait(timeout=10) == -9 and children[1].poll() is None
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_the_stack_is_the_main_thread_s():
    stack, waits = main_stack()
    assert "test_the_stack_is_the_main_thread_s" in stack and not waits


def test_a_long_stack_keeps_its_end(monkeypatch):
    monkeypatch.setattr("traceback.format_list", lambda frames: ["x" * 5000, "the last call"])
    assert main_stack()[0] == "x" * (3000 - 13) + "the last call"  # a third of a datagram's text
    shown = []
    monkeypatch.setattr("traceback.format_list", lambda frames: shown.extend(frames) or [""])
    (lambda: (lambda: main_stack())())()
    assert len(shown) == 30 and shown[-1].name == "main_stack"


def test_a_rank_in_a_collective_waits(monkeypatch):
    frame = SimpleNamespace(filename="/site-packages/torch/distributed/distributed_c10d.py")
    monkeypatch.setattr("traceback.extract_stack", lambda _: [frame])
    monkeypatch.setattr("traceback.format_list", lambda frames: ["all_reduce"])
    assert main_stack() == ("all_reduce", True)
