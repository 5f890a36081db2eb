"""The costs of a small model on a CPU, made up: for benchmarks of decisions, whose time does not depend on them."""

from __future__ import annotations

from respec_trainer.speculation.cost import CostModel, Terms

# A CPU computes and reads in turns, so times rise with every token. The values are like a 76M model's on one thread.
CPU = CostModel(
    {
        "plain": Terms(fixed=0.010, weights=0.034, kv=4e-7, token=8e-4),
        "draft": Terms(fixed=0.002, each=5e-5, weights=0.003, kv=3e-8, token=1e-4),
        "verify": Terms(fixed=0.012, each=1e-4, weights=0.034, kv=5e-7, token=5e-4, pair=2e-8),
        "extend": Terms(fixed=0.002, each=3e-5, weights=0.003, kv=3e-8, token=1e-4, pair=1e-8),
        "catch_up": Terms(fixed=0.003, token=9e-5, pair=1e-8),
        "prefill": Terms(fixed=0.040, token=6e-4, pair=2e-8),
    }
)
