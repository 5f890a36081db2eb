"""Two hosts on one machine: each with its own network, name and process numbers, and a cable between them.

    with two_hosts() as hosts:
        process = hosts[0].start(command, log)
        hosts[1].cut()                            # pulls the cable out; .kill() ends the host

A host is a process in new network, UTS, PID and mount namespaces; all that runs on it ends with it. Files are shared,
as on a cluster.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

CABLE = "wire"  # each host's end of it
NETWORK = "10.213.77.{}"
NAMES = ("host-a", "host-b")
NAMESPACES = ["--net", "--uts", "--pid", "--mount"]


@functools.cache
def missing() -> str | None:
    """Return why this machine cannot have such hosts; None if it can."""
    tools = [tool for tool in ("ip", "unshare", "nsenter", "hostname") if shutil.which(tool) is None]
    if tools:
        return f"two hosts need {', '.join(tools)}"
    try:
        with two_hosts():
            return None
    except (subprocess.CalledProcessError, AssertionError) as error:
        reason = getattr(error, "stderr", None) or error
        return f"two hosts need the right to make namespaces and a veth pair (root, CAP_NET_ADMIN): {reason}"


class Host:
    """A host that the other one reaches at `address`. It exists as long as its process `init`."""

    def __init__(self, index: int):
        self.name, self.address = NAMES[index], NETWORK.format(index + 1)
        script = f"hostname {self.name} && exec sleep infinity"
        unshare = ["unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child", "bash", "-c", script]
        self._unshare = subprocess.Popen(unshare, stderr=subprocess.PIPE, text=True)
        self.init = self._wait_for_init()
        self._spaces = f"/proc/{self.init.pid}/ns/pid"
        self.home = Path(self._spaces).readlink()

    def _wait_for_init(self) -> psutil.Process:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            assert self._unshare.poll() is None, self._unshare.stderr.read()
            children = psutil.Process(self._unshare.pid).children()
            if children and children[0].name() == "sleep":
                return children[0]
            time.sleep(0.02)
        raise AssertionError(f"{self.name} did not start within 20 s")

    def command(self, *words: str) -> list[str]:
        """Return the command that runs `words` on this host."""
        return ["nsenter", "--target", str(self.init.pid), *NAMESPACES, *words]

    def start(self, words: Sequence[str], log: Path, **environment: str) -> subprocess.Popen:
        """Start a command on this host; its output goes to `log`."""
        # gloo would use the address of the host's name, which the other host cannot reach.
        settings = os.environ | {"GLOO_SOCKET_IFNAME": CABLE} | environment
        with log.open("w") as file:
            return subprocess.Popen(self.command(*words), stdout=file, stderr=subprocess.STDOUT, env=settings)

    def processes(self) -> list[psutil.Process]:
        """Return the processes on this host, without `init`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                here = Path(f"/proc/{process.pid}/ns/pid").readlink() == self.home
                if here and process != self.init and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def cut(self) -> None:
        """Pull the cable out."""
        _run(*self.command("ip", "link", "set", CABLE, "down"))

    def lose_power(self) -> None:
        """End all processes so suddenly that no message is sent; then the host is back, with nothing running."""
        self.cut()
        while found := self.processes():  # the first list lacks a process that was just starting
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=1)
        _run(*self.command("ip", "link", "set", CABLE, "up"))

    def kill(self) -> None:
        """End the host and all its processes at once; safe to call twice."""
        self._unshare.kill()
        self._unshare.wait()
        self._unshare.stderr.close()


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts that reach each other. Raises CalledProcessError or AssertionError if that is not permitted."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for index in range(2):
            hosts.append(Host(index))
            stack.callback(hosts[-1].kill)
        first, second = (str(host.init.pid) for host in hosts)
        _run("ip", "link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for host in hosts:
            _run(*host.command("ip", "address", "add", f"{host.address}/24", "dev", CABLE))
            for device in ("lo", CABLE):
                _run(*host.command("ip", "link", "set", device, "up"))
        yield hosts[0], hosts[1]


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
