"""Auditor: runs a real engine in each of its modes and tests the samples against the actor's own law."""

from __future__ import annotations

import atexit
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from respec_trainer.actor.engine import Actor
from respec_trainer.actor.parallel import init_parallel
from respec_trainer.audit.cells import Cell, Mode, speculation_of
from respec_trainer.audit.draws import NEW_TOKENS, Plan, examine
from respec_trainer.audit.ends import Ends, check_switched
from respec_trainer.audit.law import FLOAT32_ODDS, laws
from respec_trainer.audit.prefixes import LogitsCache
from respec_trainer.audit.prepare import audit_prompts
from respec_trainer.audit.report import CellResult, Standard
from respec_trainer.audit.wide_drafter import widen_drafter
from respec_trainer.config import Config
from respec_trainer.data.prompts import load_prompts
from respec_trainer.drafter.online.learner import FrozenDrafter
from respec_trainer.resync import Resync
from respec_trainer.resync.transport import setup_transport
from respec_trainer.rollout.batch import collate
from respec_trainer.rollout.sample import Request, SamplingParams
from respec_trainer.rollout.sglang.engine import SGLangEngine
from respec_trainer.rollout.sglang.settings import EngineSettings
from respec_trainer.speculation.algorithms import DrafterFolder, algorithm_of

# Overrides of an audit's configuration: one process, and float32, in which engine and actor agree up to rounding that
# no test can detect. An audit tests the sampler; the mismatch of log-probs in training measures lower precision.
OVERRIDES = (
    "model.dtype=fp32",
    "actor.parallel.tp=1",
    "actor.parallel.sequence_parallel=false",
    "actor.optim.lr=0.001",
    "actor.optim.warmup_steps=0",
    "rollout.engine.tp=1",
    "rollout.engine.span=1",
    "rollout.engine.max_running_requests=64",
    "rollout.engine.min_free_slots=32",
    "rollout.sampling.temperature=1.0",
    f"rollout.sampling.max_new_tokens={NEW_TOKENS}",
)
LIMITS = (3, 8, 13, NEW_TOKENS)  # token limits of the responses in turn, in cells with different limits
SWITCH_AT = 48  # batch size from which speculation is off, of at most 64
UPDATES = 2  # updates of the actor before a resync, so that the test detects stale weights


class Auditor:
    """Runs an audit in one process with one rank.

    Args:
        config: with OVERRIDES.
        draws, limit: least and most responses drawn for a cell.
        notify: called with a line of text about the progress.
    """

    def __init__(self, config: Config, standard: Standard, draws: int, limit: int, notify: Callable[[str], None]):
        self.config, self.standard, self.notify = config, standard, notify
        self.draws, self.limit = draws, max(draws, limit)
        self.topology = init_parallel(config)
        self.device = self.topology.device.type
        self.control = dist.new_group(backend="gloo")
        self.actor = Actor(config, self.topology, total_updates=UPDATES)
        self.logits = LogitsCache(self.actor.logits_at, self.actor.multiple_of)
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        starts = [p.ids for p in load_prompts(config.data, self.tokenizer, config.data.max_prompt_tokens)]
        self.prompts, self.continuations = audit_prompts(
            starts, self.actor.generate_greedy, self.end_tokens, NEW_TOKENS
        )
        self.resync: Resync | None = None

    @property
    def end_tokens(self) -> frozenset[int]:
        given = self.actor.hf_config.eos_token_id
        return frozenset(given if isinstance(given, list) else [given])

    def run(self, cells: Sequence[Cell], modes: dict[str, Mode]) -> Iterator[CellResult]:
        """Yield the results of the cells, in order; neighboring cells of one mode share an engine."""
        for name, group in groupby(cells, key=lambda cell: cell.mode):
            self.notify(f"starting the engine: {name}")
            with self.engine(modes[name]) as engine:
                for cell in group:
                    yield self._examine(engine, modes[name], cell, len(cells))

    @contextmanager
    def engine(self, mode: Mode) -> Iterator[SGLangEngine]:
        engine = SGLangEngine(self._settings(mode))
        engine.start()
        try:
            yield engine
        finally:
            engine.shutdown()
            gc.collect()

    def _resync_of(self, engine: SGLangEngine) -> Resync:
        if self.resync is None or self.resync.engine is not engine:
            transport = setup_transport(self.config, self.device, engine, [0], self.control)
            drafter = FrozenDrafter(self.config.drafter.path, self.actor.hf_config)
            self.resync = Resync(self.config, self.actor, drafter, engine, transport, self.control)
        return self.resync

    def _settings(self, mode: Mode) -> EngineSettings:
        config = self.config
        speculation = speculation_of(mode, config.speculation)
        # For an algorithm with a draft model use the actor itself: it always exists, and its tokenizer fits.
        drafters = {DrafterFolder.EAGLE3: self._drafter(mode.wide), DrafterFolder.MODEL: config.model.path}
        settings = EngineSettings.from_config(config, self.device)
        return replace(
            settings,
            speculation=speculation,
            drafter_path=drafters.get(algorithm_of(speculation).folder),
            tokenizer=mode.text,
            steps_by_batch={1: speculation.steps, SWITCH_AT: 0} if mode.switching else None,
        )

    def _drafter(self, wide: bool) -> str | None:
        path = self.config.drafter.path
        if not wide or path is None:
            return path
        folder = tempfile.TemporaryDirectory(prefix="respec_audit_")
        atexit.register(folder.cleanup)
        return str(widen_drafter(path, self.actor.hf_config, Path(folder.name) / "drafter"))

    def _examine(self, engine: SGLangEngine, mode: Mode, cell: Cell, cells: int) -> CellResult:
        self.notify(cell.name)
        if cell.before != "nothing":
            self._update_and_push(engine, sleep=cell.before == "sleep")
        params = SamplingParams(NEW_TOKENS, **({"temperature": 1.0} | cell.sampling))
        if cell.ends:
            params = self._with_stops(params, mode)
        ends = Ends(self.end_tokens, self.tokenizer)

        def check(samples, asked) -> set[str]:
            return ends.check(samples, asked) | (check_switched(samples) if mode.switching else set())

        plan = Plan(
            name=cell.name,
            prompts=self.prompts,
            params=params,
            laws_after=lambda prefixes: laws(self.logits(prefixes), params, FLOAT32_ODDS),
            limits=LIMITS if cell.ends else (),
            check=check,
        )
        return examine(engine, plan, self.standard, cells, self.limit, self.draws)

    def _with_stops(self, params: SamplingParams, mode: Mode) -> SamplingParams:
        """Add stops that many responses meet: a token and a piece of text from the likeliest responses."""
        first, second = self.continuations
        middle = len(first) // 2
        stop = (self.tokenizer.decode(first[middle : middle + 2]),) if mode.text and first else ()
        return replace(params, stop=stop, stop_token_ids=tuple(second[6:7]))

    def _update_and_push(self, engine: SGLangEngine, sleep: bool) -> None:
        """Do the work of a training step between two phases of generation, with a change that the test can detect."""
        drawn = engine.submit(
            [Request(str(i), prompt, SamplingParams(NEW_TOKENS)) for i, prompt in enumerate(self.prompts * 8)]
        ).collect()
        if sleep:
            engine.sleep()
        batch = collate(drawn, pad_id=0)
        advantages = torch.tensor([1.0, -1.0] * (len(drawn) // 2))
        for _ in range(UPDATES):
            self.actor.update(batch, self.actor.infer(batch).logprobs, advantages)
        self.logits.clear()
        if sleep:
            engine.wake("weights")
        self._resync_of(engine).push(whole=sleep)
        if sleep:
            engine.wake("kv_cache")
