"""FairSample: which rows of a step to keep within a number of bytes, so that short ones are not preferred.

A budget of bytes holds more short rows than long ones. Dropping rows in random order until the rest fits is therefore
not fair: a long row stays less often, because less fits beside it. The mean size of all that stays is then too small by
about the squared coefficient of variation of the sizes over the number of rows: by 10 % for 10 rows whose sizes vary by
as much as their mean. To leave out a row that does not fit and try the next one is worse.

Here sizes decide how many rows stay, before it is drawn which. The rows lie on a circle, a uniform draw says where it
begins, and an arc from there stays. The arc's share of the circle is one that fits wherever it begins.

Exact: every row is in a share f with probability f, whatever its size, and a smaller share is a part of a larger one.
Not independent: neighbors on the circle differ in size as much as they can, so that every arc has rows of all sizes.
Its mean size then varies less than that of independent draws, and little room is lost: about the size of the largest
row, because every arc has to fit. (Systematic sampling: Cochran, Sampling Techniques, chapter 8.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are spread evenly, however many there are
ROUNDING = 1e-6  # of a row: share * n may lie above a whole number by rounding alone


@dataclass(frozen=True, eq=False)
class FairSample:
    """n rows by ascending key: those of keys below f are a fair share f of them.

    `keys` [n] float64 are in [0, 1). `needs` [n + 1] int64 are the most bytes that 0, 1, .. n neighbors take.
    """

    keys: torch.Tensor
    needs: torch.Tensor

    @classmethod
    def draw(cls, sizes: Sequence[int], generator: torch.Generator) -> tuple[list[int], FairSample]:
        """Draw for rows of these sizes, in bytes. Return the indices of the rows by ascending key, and their sample."""
        count, size = len(sizes), torch.tensor(sizes, dtype=torch.int64)
        mixed = torch.randperm(count, generator=generator)  # puts rows of equal size in random order
        ascending = mixed[size[mixed].sort(stable=True).indices]
        steps = torch.arange(count, dtype=torch.float64)
        circle = ascending[(steps * GOLDEN % 1).argsort()]
        begin = torch.rand((), generator=generator, dtype=torch.float64).item() * count
        circle = circle.roll(-int(begin))
        return circle.tolist(), cls((begin % 1 + steps) / max(count, 1), arc_sizes(size[circle]))

    def share(self, room: int) -> float:
        """The largest share whose rows take at most `room` bytes wherever the circle begins; 1 if there are no rows."""
        held = int(torch.searchsorted(self.needs, max(room, 0), right=True)) - 1
        return held / len(self.keys) if len(self.keys) else 1.0

    def count(self, share: float) -> int:
        """The number of rows in a share, the first ones: never more than n times the share, rounded up."""
        return int(torch.searchsorted(self.keys, share))

    def most_bytes(self, share: float) -> int:
        """The most bytes that the rows of a share take wherever the circle begins."""
        return int(self.needs[math.ceil(share * len(self.keys) - ROUNDING)])


def arc_sizes(circle: torch.Tensor) -> torch.Tensor:
    """The largest sums of 0, 1, .. n neighbors on a circle of sizes [n] int64: [n + 1]."""
    count = len(circle)
    ends = torch.cat([circle.new_zeros(1), circle, circle]).cumsum(0)
    sums = [(ends[arc : arc + count] - ends[:count]).max() for arc in range(1, count + 1)]
    return torch.stack([circle.new_zeros(()), *sums])
