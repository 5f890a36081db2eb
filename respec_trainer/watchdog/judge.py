"""Judge: from ranks' beats, whether the run must end, and why. No sockets and no clock.

The first rank's judges all ranks; those of the others judge the first, and leave to it whether somebody hangs.
"""

from __future__ import annotations

from collections.abc import Sequence

from respec_trainer.watchdog.messages import Beat, Verdict
from respec_trainer.watchdog.words import died_text, ended_text, failed_text, hanging_text, silent_text, unheard_text


class Judge:
    """Times are seconds of any clock that stands still while this process does."""

    def __init__(self, ranks: Sequence[int], home: str, lost_after: float, hang_timeout: float):
        """`ranks`: whom to watch; `home`: this process's, where others can be looked at."""
        self.ranks, self.home, self.lost_after, self.hang_timeout = ranks, home, lost_after, hang_timeout
        self.beats: dict[int, Beat] = {}
        self.heard: dict[int, float] = {}
        self.met_at: float | None = None  # when all ranks were known to be there
        self.asked_at: float | None = None  # when stacks were asked for

    def met(self, now: float) -> None:
        """All ranks have met in a process group: from now on each must be heard, and none can be exchanged."""
        self.met_at = now

    def hear(self, beat: Beat, now: float) -> bool:
        """Take note of a beat; False for that of a stranger, as a rank of an earlier run is."""
        if beat.rank not in self.ranks:
            return True
        known = self.beats.get(beat.rank)
        stranger = known is not None and known.process != beat.process and self.met_at is not None
        if stranger:
            return False
        self.beats[beat.rank], self.heard[beat.rank] = beat, now
        return True

    def is_done(self, rank: int) -> bool:
        """Whether that rank has said that it has done its work."""
        return rank in self.beats and self.beats[rank].state == "done"

    def decide(self, now: float) -> Verdict | None:
        """Why the run must end now, the most certain cause first; None: it goes on."""
        return self._failed() or self.died() or self._silent(now) or self._ended(now)

    def died(self) -> Verdict | None:
        """Ranks on this machine whose processes are gone, without a word."""
        nearby = [beat for beat in self._going() if beat.process.home == self.home]
        gone = [beat for beat in nearby if beat.process.here() is None]
        return Verdict(died_text(gone, self._others(gone))) if gone else None

    def _failed(self) -> Verdict | None:
        failed = [beat for beat in self.beats.values() if beat.state == "failed"]
        return Verdict(failed_text(failed[0])) if failed else None

    def _silent(self, now: float) -> Verdict | None:
        """Ranks not heard for too long; where one is, those count that have missed half as much."""
        limit = self.hang_timeout if self.met_at is None else self.lost_after
        absent = [rank for rank in self.ranks if rank not in self.beats]
        if absent and now - (self.met_at or 0.0) > limit:
            return Verdict(unheard_text(absent, limit, self.met_at is not None))
        silence = {beat.rank: now - self.heard[beat.rank] for beat in self._going()}
        if not silence or max(silence.values()) <= self.lost_after:
            return None
        silent = [self.beats[rank] for rank, seconds in sorted(silence.items()) if seconds > self.lost_after / 2]
        lost = tuple(beat.process for beat in silent)
        return Verdict(silent_text(silent, max(silence.values()), self._others(silent)), lost)

    def _ended(self, now: float) -> Verdict | None:
        """A rank that a signal ended is rarely the cause: its launcher sends one when another rank has died."""
        ended = [beat for beat in self.beats.values() if beat.state == "ended"]
        late = [beat for beat in ended if now - self.heard[beat.rank] > self.lost_after]
        return Verdict(ended_text(ended, self._others(ended))) if late else None

    def hanging(self, now: float) -> Verdict | None:
        """Who has entered no phase for too long, once the ranks have sent their stacks, or had the time to."""
        going = self._going()
        if not any(beat.still > self.hang_timeout for beat in going):
            self.asked_at = None
            return None
        self.asked_at = now if self.asked_at is None else self.asked_at
        if not all(beat.stack for beat in going) and now - self.asked_at < self.lost_after / 2:
            return None
        hanging = self._behind(going)
        lost = tuple(beat.process for beat in hanging)
        return Verdict(hanging_text(hanging, self._others(hanging), self.hang_timeout), lost)

    def _behind(self, going: list[Beat]) -> list[Beat]:
        """Those whom the others wait for: fewest phases entered, else the ones that are in no collective, else all."""
        behind = [beat for beat in going if beat.moves == min(other.moves for other in going)]
        if len(behind) == len(going):
            behind = [beat for beat in going if not beat.waits] or going
        return behind

    def _going(self) -> list[Beat]:
        """Ranks that should be heard of."""
        return [self.beats[rank] for rank in sorted(self.beats) if self.beats[rank].state in ("running", "broken")]

    def _others(self, some: list[Beat]) -> list[Beat]:
        ranks = {beat.rank for beat in some}
        return [beat for beat in self._going() if beat.rank not in ranks]
