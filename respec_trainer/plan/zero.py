"""Memory of DeepSpeed 0.19.8 for P numbers over `dp` data-parallel ranks, with AdamW and float32 gradient sums.

| stage | weights    | master, moments | gradient sums    | besides, during an update                         |
|-------|------------|-----------------|------------------|---------------------------------------------------|
| 1     | b P        | 12 P / dp       | 4 P              | b P: the weights' own gradients, of a bf16 model  |
| 2     | b P        | 12 P / dp       | 4 P / dp         | 4 P / dp, a bucket, the largest weight's gradient |
| 3     | b P / dp   | 12 P / dp       | 4 P / dp, bucket | the same, and the weights gathered at one time    |

A weight has b bytes. Stage 3 gathers as many weights at one time as DeepSpeed's default allows. After an update the
sums of stage 1 of a bf16 model and the sums of stage 3 stay allocated; the others are freed.
"""

from __future__ import annotations

from dataclasses import dataclass

from respec_trainer.plan.sizes import FLOAT

BUCKET = 50_000_000  # numbers; `reduce_bucket_size` of actor/engine.py
LIVE = 1_000_000_000  # numbers that ZeRO-3 may keep gathered


@dataclass(frozen=True)
class ZeroSizes:
    """Bytes on one rank for `numbers` parameters of `width` bytes; the largest parameter has `largest` numbers."""

    numbers: int
    width: int
    dp: int
    stage: int
    largest: int

    @property
    def share(self) -> int:
        return -(-self.numbers // self.dp)

    @property
    def weights(self) -> int:
        return self.width * (self.share if self.stage == 3 else self.numbers)

    @property
    def optimizer(self) -> int:
        return 3 * FLOAT * self.share

    @property
    def gradients(self) -> int:
        """Bytes of the sums over micro-batches. Stage 1 of a float32 model sums in the weights' own gradients."""
        bucket = self.width * BUCKET if self.stage == 3 else 0
        return FLOAT * (self.numbers if self.stage == 1 else self.share) + bucket

    @property
    def update(self) -> int:
        if self.stage == 1:
            return self.width * self.numbers if self.width < FLOAT else FLOAT * self.share
        more = min(self.numbers, LIVE) if self.stage == 3 else BUCKET
        return FLOAT * self.share + self.width * (self.largest + more)

    @property
    def how(self) -> dict[str, str]:
        over = f" / dp {self.dp}" if self.dp > 1 else ""
        return {
            "weights": f"{self.width} bytes each" + (over if self.stage == 3 else ""),
            "optimizer": f"ZeRO-{self.stage}: 12 bytes each{over}",
            "gradients": "4 bytes each" + (over if self.stage > 1 else "") + (", a bucket" if self.stage == 3 else ""),
            "update": ("own gradients", "bucket, second sum", "second sum, gathered weights")[self.stage - 1],
        }
