"""EngineSettings: the settings of one engine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Literal

from respec_trainer.config import Config, DType, EngineConfig, SpeculationConfig
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.speculation.algorithms import algorithm_of, none
from respec_trainer.speculation.algorithms.checks import check_speculation

# Engine i of a run starts with seed run.seed + i. Later starts add this, so that no two starts have the same seed.
SEEDS_BETWEEN_STARTS = 1_000_003
NO_SPECULATION = SpeculationConfig(algorithm=none.ALGORITHM.name)


@dataclass(frozen=True)
class EngineSettings:
    """Settings of one engine. `drafter_path` is for speculation algorithms with a drafter.

    Raises ConfigError if the speculation settings do not fit their algorithm.
    """

    model_path: str
    drafter_path: str | None = None
    dtype: DType = "bf16"
    device: Literal["cpu", "cuda"] = "cpu"
    engine: EngineConfig = field(default_factory=EngineConfig)
    speculation: SpeculationConfig = NO_SPECULATION
    seed: int = 0
    base_gpu_id: int = 0
    # Stop strings are found in text, so they need the tokenizer and one more process, which runs it.
    tokenizer: bool = False
    # Requests may have seeds; then every draw of the engine is a function of a seed and a position.
    seeded: bool = False
    # Log-probs are of what top_k and top_p keep. False: they are of the whole vocabulary, as sglang returns them.
    truncated_logprobs: bool = True
    context_length: int | None = None  # None: the model's
    # Weights at the start: "auto" reads the folder's; "dummy" makes random ones, for when only shapes matter.
    load_format: Literal["auto", "dummy"] = "auto"
    actor_version: str = "initial"
    drafter_version: str = "initial"

    # Draft steps for batches of each size and more, by sglang's own table; None: always speculation.steps.
    steps_by_batch: dict[int, int] | None = None
    # Settings of this package's choice of draft steps, with a log; None: they do not change, and there is no log.
    steps: DepthSettings | None = None

    def __post_init__(self) -> None:
        check_speculation(self.speculation)

    @classmethod
    def from_config(cls, config: Config, device: str, index: int = 0) -> EngineSettings:
        """The settings of engine `index` of a run; `device` is "cpu" or "cuda"."""
        engine = config.rollout.engine
        if device == "cpu" and engine.max_total_tokens is None:
            tokens = tokens_of_full_batch(config)
            engine = engine.model_copy(update={"max_total_tokens": tokens})
        speculative = algorithm_of(config.speculation).drafts
        sampling = config.rollout.sampling
        return cls(
            model_path=config.model.path,
            drafter_path=config.drafter.path if speculative else None,
            dtype=config.model.dtype,
            device=device,
            engine=engine,
            speculation=config.speculation if speculative else NO_SPECULATION,
            seed=config.run.seed + index,
            base_gpu_id=int(os.environ.get("LOCAL_RANK", "0")) if device == "cuda" else 0,  # on a CPU: NUMA node
            tokenizer=bool(sampling.stop),
            seeded=sampling.seeded,
            truncated_logprobs=not sampling.allow_untruncated,
        )

    def of_start(self, number: int) -> EngineSettings:
        """Return the settings for the engine's start number `number`, from 0: each start has a seed of its own."""
        return replace(self, seed=(self.seed + number * SEEDS_BETWEEN_STARTS) % 2**31)

    @property
    def speculative(self) -> bool:
        return algorithm_of(self.speculation).drafts


def tokens_of_full_batch(config: Config) -> int:
    """Return the KV cache rows for `max_running_requests` of the longest samples, and for every prompt of a step.

    On a CPU the pool is no larger: rows are reused in turn, so a larger pool would only touch more memory.
    """
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_new_tokens
    # sglang reserves two rounds of drafts for each request ahead of verification.
    drafts = 2 * config.speculation.draft_tokens * config.speculation.topk
    prompts = config.data.prompts_per_step * config.data.max_prompt_tokens
    return config.rollout.engine.max_running_requests * (longest + drafts + 1) + prompts
