"""Judge: decides from ranks' beats whether the run must end, and why. It has no sockets and no clock.

The judge of the first rank watches all ranks. The judges of other ranks watch only the first rank, which alone decides
whether a rank hangs.
"""

from __future__ import annotations

from collections.abc import Sequence

from respec_trainer.watchdog.messages import Beat, Verdict
from respec_trainer.watchdog.words import absent_text, died_text, ended_text, failed_text, hanging_text, silent_text


class Judge:
    """Decides whether the run must end. Times are seconds of any clock that stops while this process is stopped."""

    def __init__(self, ranks: Sequence[int], home: str, lost_after: float, hang_timeout: float):
        """
        Args:
            ranks: the ranks to watch.
            home: the home of this process (see Process): processes of the same home can be examined.
            lost_after, hang_timeout: seconds, as in the configuration's section `run`.
        """
        self.ranks, self.home, self.lost_after, self.hang_timeout = ranks, home, lost_after, hang_timeout
        self.beats: dict[int, Beat] = {}
        self.received_at: dict[int, float] = {}  # time of each rank's last beat
        self.met_at: float | None = None  # time when all ranks had met
        self.asked_at: float | None = None  # time when stacks were requested

    def met(self, now: float) -> None:
        """Note that all ranks have met in a process group: from now on each must send beats, and keep its process."""
        self.met_at = now

    def record(self, beat: Beat, now: float) -> bool:
        """Record a beat. Return False for a beat of another process, such as a rank of an earlier run."""
        if beat.rank not in self.ranks:
            return True
        known = self.beats.get(beat.rank)
        stranger = known is not None and known.process != beat.process and self.met_at is not None
        if stranger:
            return False
        self.beats[beat.rank], self.received_at[beat.rank] = beat, now
        return True

    def is_done(self, rank: int) -> bool:
        """Return whether that rank has reported that its work is done."""
        return rank in self.beats and self.beats[rank].state == "done"

    def decide(self, now: float) -> Verdict | None:
        """Return why the run must end now, the most certain cause first; None if it continues."""
        return self._failed() or self.died() or self._silent(now) or self._ended(now)

    def died(self) -> Verdict | None:
        """Return the verdict on ranks of this machine whose processes ended without a message; None if none did."""
        nearby = [beat for beat in self._going() if beat.process.home == self.home]
        gone = [beat for beat in nearby if beat.process.here() is None]
        return Verdict(died_text(gone, self._others(gone))) if gone else None

    def _failed(self) -> Verdict | None:
        failed = [beat for beat in self.beats.values() if beat.state == "failed"]
        return Verdict(failed_text(failed[0])) if failed else None

    def _silent(self, now: float) -> Verdict | None:
        """Return the verdict on ranks silent for `lost_after`; it includes others that were silent for half as long."""
        limit = self.hang_timeout if self.met_at is None else self.lost_after
        absent = [rank for rank in self.ranks if rank not in self.beats]
        if absent and now - (self.met_at or 0.0) > limit:
            return Verdict(absent_text(absent, limit, self.met_at is not None))
        silence = {beat.rank: now - self.received_at[beat.rank] for beat in self._going()}
        if not silence or max(silence.values()) <= self.lost_after:
            return None
        silent = [self.beats[rank] for rank, seconds in sorted(silence.items()) if seconds > self.lost_after / 2]
        lost = tuple(beat.process for beat in silent)
        return Verdict(silent_text(silent, max(silence.values()), self._others(silent)), lost)

    def _ended(self, now: float) -> Verdict | None:
        """Return the verdict on ranks ended by a signal, after a wait: a launcher signals them if another rank died."""
        ended = [beat for beat in self.beats.values() if beat.state == "ended"]
        late = [beat for beat in ended if now - self.received_at[beat.rank] > self.lost_after]
        return Verdict(ended_text(ended, self._others(ended))) if late else None

    def hanging(self, now: float) -> Verdict | None:
        """Return the verdict on ranks that entered no phase for `hang_timeout`, after a wait for the ranks' stacks."""
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
        """Return the ranks that the others wait for: those with the fewest phases, or in no collective, or all."""
        behind = [beat for beat in going if beat.moves == min(other.moves for other in going)]
        if len(behind) == len(going):
            behind = [beat for beat in going if not beat.waits] or going
        return behind

    def _going(self) -> list[Beat]:
        """Return the last beats of ranks that must still send beats."""
        return [self.beats[rank] for rank in sorted(self.beats) if self.beats[rank].state in ("running", "broken")]

    def _others(self, some: list[Beat]) -> list[Beat]:
        ranks = {beat.rank for beat in some}
        return [beat for beat in self._going() if beat.rank not in ranks]
