"""A running engine with a drafter, an actor on two ranks, and the resync between them, for tests."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.models import save_tiny_model, tiny_config, tiny_tokenizer

PROMPT = [5, 9, 33]
VOCAB = 128


def save_random_pair(root: Path) -> tuple[Path, Path]:
    """Save a target and a random drafter, and return their folders. Few drafts are accepted, but all are verified."""
    import torch

    from respec_trainer.drafter.eagle3 import Eagle3Drafter
    from respec_trainer.drafter.format import save_drafter
    from respec_trainer.drafter.shape import DrafterShape

    hf_config = tiny_config("qwen3", vocab_size=VOCAB, layers=4)
    target = save_tiny_model(root / "target", hf_config)
    tiny_tokenizer(VOCAB).save_pretrained(target)
    torch.manual_seed(0)
    drafter = Eagle3Drafter(DrafterShape.for_target(hf_config, draft_vocab_size=VOCAB))
    save_drafter(drafter, torch.arange(VOCAB), root / "drafter")
    return target, root / "drafter"


@dataclass
class Setup:
    """The parts of one rank."""

    actor: Any
    drafter: Any
    fleet: Any
    resync: Any
    rollouts: Any
    said: list[str]

    @property
    def engine(self):
        return self.fleet.engine


@contextlib.contextmanager
def live(config):
    """Make and start the parts; their processes and groups end with the block."""
    import torch.distributed as dist

    from respec_trainer.actor.engine import Actor
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.drafter.online.setup import setup_learner
    from respec_trainer.generation import Generation
    from respec_trainer.resync import Resync
    from respec_trainer.resync.canary import Canary
    from respec_trainer.resync.transport import setup_transport
    from respec_trainer.rollout.fleet.fleet import RolloutFleet
    from respec_trainer.rollout.sglang.engine import SGLangEngine
    from respec_trainer.rollout.sglang.settings import EngineSettings
    from respec_trainer.speculation.algorithms import algorithm_of

    topology = init_parallel(config)
    control = dist.new_group(backend="gloo")
    actor = Actor(config, topology, total_updates=100)
    has_drafter = algorithm_of(config.speculation).pushes
    drafter = setup_learner(config, actor.hf_config) if has_drafter else None
    fleet = RolloutFleet(config, lambda i: SGLangEngine(EngineSettings.from_config(config, "cpu", i)), control, "cpu")
    try:
        transport = setup_transport(config, "cpu", fleet.engine, fleet.owners, control)
        resync = Resync(config, actor, drafter, fleet.engine, transport, control)
        said: list[str] = []
        canary = Canary(PROMPT, 4, tolerance=0.01)
        yield Setup(actor, drafter, fleet, resync, Generation(fleet, resync, actor, 1, said.append, canary), said)
    finally:
        fleet.shutdown()
        shutdown_parallel()


def step(actor) -> None:
    """Make one optimizer step on made-up samples."""
    import torch

    from respec_trainer.rollout.batch import collate
    from respec_trainer.rollout.sample import Sample

    samples = [Sample("k", PROMPT, [11 + i, 50, 60 + i], [-3.0] * 3, "stop", "a", "d") for i in range(4)]
    batch = collate(samples, pad_id=0)
    actor.update(batch, actor.infer(batch).logprobs, torch.tensor([1.0, -1.0, 2.0, -0.5]))


def greedy(fleet, new_tokens: int = 12):
    """Return the engines' greedy continuation of PROMPT."""
    from respec_trainer.rollout.sample import Request, SamplingParams

    params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return fleet.start([Request("0", tuple(PROMPT), params)]).collect()[0]
