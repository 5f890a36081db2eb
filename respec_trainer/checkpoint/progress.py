"""Progress of a long conversion, in bytes."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def begin(self, what: str, total: int) -> None:
        """Begin a new phase of `total` bytes."""

    def advance(self, size: int) -> None:
        """Count `size` more bytes as done."""


class Silent:
    """Progress that is not shown."""

    def begin(self, what: str, total: int) -> None:
        pass

    def advance(self, size: int) -> None:
        pass


class Bar:
    """A progress bar for each phase, on the standard error stream. Use it in a `with` statement."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(stderr=True))

    def begin(self, what: str, total: int) -> None:
        self._phase = self._bars.add_task(what, total=total)

    def advance(self, size: int) -> None:
        self._bars.advance(self._phase, size)

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()
