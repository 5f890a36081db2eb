"""Profiles of made-up hardware whose true times are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks import small_cpu
from respec_trainer.speculation.cost import CostModel, Terms
from respec_trainer.speculation.policy import FixedPolicy
from respec_trainer.speculation.profiling.profile import CYCLE, Cell, Identity, Profile, Timing
from respec_trainer.speculation.shape import OFF, Shape, chain
from respec_trainer.speculation.simulation.informed import InformedPolicy
from respec_trainer.speculation.simulation.simulator import Outcome, Setting, simulate
from respec_trainer.speculation.simulation.trace import Trace

IDENTITY = Identity(
    versions={"sglang": "0.5.21", "torch": "2.13.0", "respec_trainer": "0.1.0"},
    device="made-up",
    threads=1,
    model="0123456789abcdef",
    drafter="fedcba9876543210",
    dtype="bf16",
    tp=1,
)

CPU = small_cpu.CPU  # made-up costs that benchmarks use as well
# A GPU computes while it reads: a pass takes the same time until its tokens are many.
GPU = CostModel(
    {
        "plain": Terms(fixed=1e-3, weights=5e-3, kv=2.5e-8, token=3e-5, overlap=8.0),
        "draft": Terms(fixed=3e-4, each=1e-6, weights=3e-4, kv=1e-9, token=2e-6, overlap=8.0),
        "verify": Terms(fixed=1.3e-3, each=2e-6, weights=5e-3, kv=2.5e-8, token=3e-5, pair=1e-10, overlap=8.0),
        "extend": Terms(fixed=3e-4, each=1e-6, weights=4e-4, kv=1e-9, token=2e-6, overlap=8.0),
        "catch_up": Terms(fixed=5e-4, token=2e-6, pair=1e-11),
        "prefill": Terms(fixed=5e-3, token=3e-5, pair=1e-10),
    }
)
BATCHES, CONTEXTS = (1, 2, 4, 8, 16, 32, 64), (128, 512, 2048)
CHAINS = tuple(chain(steps) for steps in (1, 2, 3, 5))


def profile_of(
    truth: CostModel,
    noise: float = 0.0,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    shapes: Sequence[Shape] = CHAINS,
    seed: int = 0,
    graphs: Sequence[int] = (),
) -> Profile:
    """A profile of five repeats, each with a random error: the logarithm of its time is normal."""
    generator = np.random.default_rng(seed)

    def timing(piece: str, shape: Shape, batch: int, context: int) -> Timing:
        true = truth.piece_seconds(piece, shape, batch, context)
        return Timing(seconds=(true * np.exp(noise * generator.standard_normal(5))).tolist())

    cells = []
    for batch in batches:
        for context in contexts:
            for shape in (OFF, *shapes):
                pieces = CYCLE if shape != OFF else ("plain", "extend", "catch_up", "prefill")
                times = {piece: timing(piece, shape, batch, context) for piece in pieces}
                cells.append(Cell(batch=batch, context=context, shape=shape, times=times))
    return Profile(identity=IDENTITY, graph_sizes=list(graphs), cells=cells)


def skewed_trace(
    responses: int = 64, acceptance: Sequence[float] = (0.8, 0.7, 0.6), longest: int = 2000, seed: int = 0
) -> Trace:
    """A trace of heavy-tailed lengths: most responses short, a few at the limit; groups of four."""
    generator = np.random.default_rng(seed)
    lengths = np.minimum(generator.lognormal(5.0, 1.0, responses).astype(int) + 1, longest)
    prompt = np.repeat(generator.integers(20, 100, -(-responses // 4)), 4)[:responses]
    return Trace(prompt, lengths, np.arange(responses) // 4, np.tile(np.array(acceptance, dtype=float), (responses, 1)))


def references(trace: Trace, costs: CostModel, steps: Sequence[int], setting: Setting) -> list[Outcome]:
    """The rollouts against which regret is measured: three kinds of full knowledge, and every fixed number of steps."""
    makers = [lambda kind=kind: InformedPolicy(kind, costs, steps) for kind in ("greedy", "weighted", "critical")]
    makers += [lambda each=each: FixedPolicy(each) for each in steps]
    return [simulate(trace, costs, make, setting) for make in makers]
