"""A made-up GPU like an H100 with a 7B model: kernels one after the other, CUDA graphs, and tiles of matrices.

Its times come from counts of bytes and operations, not from the terms of the cost model.
"""

from __future__ import annotations

from respec_trainer.speculation.shape import OFF, Shape

GRAPHS = (1, 2, 4, *range(8, 161, 8))
BANDWIDTH, FLOPS = 2.7e12, 6e14  # bytes and operations a second that kernels reach
ATTENTION_BANDWIDTH, ATTENTION_FLOPS = 2.0e12, 3e14
TILE = 16  # rows of a matrix product that are computed together
# parameters read a token, layers, heads x head size, bytes of keys and values a token
TARGET = (7.1e9, 28, 28 * 128, 28 * 2 * 4 * 128 * 2)
DRAFTER = (0.3e9, 1, 28 * 128, 2 * 4 * 128 * 2)


def one_pass(model: tuple, rows: int, cached: float, pairs: float) -> float:
    """Seconds of a pass over `rows` tokens that reads `cached` tokens and attends over `pairs`."""
    parameters, layers, width, bytes_a_token = model
    tiles = -(-rows // TILE) * TILE
    products = max(2 * parameters / BANDWIDTH, 2 * parameters * tiles / FLOPS)
    attention = max(bytes_a_token * cached / ATTENTION_BANDWIDTH, 4 * layers * width * pairs / ATTENTION_FLOPS)
    return products + attention + layers * 4e-6


class H100:
    """Has the methods of a CostModel that profiles and tests call."""

    def piece_seconds(self, piece: str, shape: Shape, batch: int, context: int) -> float:
        read = batch * context
        rows = next((size for size in GRAPHS if size >= batch), batch)
        model = TARGET if piece in ("plain", "verify", "prefill") else DRAFTER
        if piece in ("catch_up", "prefill"):
            return 5e-4 + one_pass(model, read, 0, read * context / 2)
        if piece == "draft":
            return 1e-4 + (shape.steps - 1) * one_pass(model, rows, read, read)
        tokens = shape.draft_tokens
        return 4e-4 + 2e-6 * batch + one_pass(model, rows * tokens, read, read * tokens)

    def cycle_seconds(self, shape: Shape, batch: int, context: int) -> float:
        pieces = ("plain",) if shape == OFF else ("draft", "verify", "extend")
        return sum(self.piece_seconds(piece, shape, batch, context) for piece in pieces)
