"""Registry: named entries, from which a key of the configuration selects one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from respec_trainer.errors import ConfigError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name, in the order added. `key` is the configuration key that selects one, for error messages."""

    def __init__(self, key: str, entries: dict[str, Entry] | None = None):
        self.key = key
        self._entries: dict[str, Entry] = dict(entries or {})

    def add(self, name: str, entry: Entry) -> Entry:
        """Add `entry` under `name`, and return it. Raises ValueError for a name that is taken."""
        if name in self._entries:
            raise ValueError(f"{self.key}: the name {name!r} is taken")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> Entry:
        """Return the entry of that name. Raises ConfigError for an unknown name, with the most similar one."""
        if name not in self._entries:
            nearest, known = self.nearest(name), ", ".join(self)
            raise ConfigError(f"{self.key}={name}: there is no {name!r}; did you mean {nearest!r}? Known: {known}")
        return self._entries[name]

    def nearest(self, name: str) -> str:
        """Return the name of an entry that is most similar to `name`."""
        return max(self._entries, key=lambda known: difflib.SequenceMatcher(None, name, known).ratio())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
