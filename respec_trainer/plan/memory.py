"""Estimate a run's GPU memory, part by part and phase by phase, from configuration and model shapes alone.

Engines and trainer take turns on a GPU, so no phase holds everything:

    generate  the engine and the Online Learner; the actor is in host memory, also while the engine starts and sizes
              its key/value cache by the free memory
    train     the actor with gradients and activations; the engine sleeps
    resync    the actor's weights, the engine's, and the buckets between them

If engines have GPUs of their own, the actor and the engine keep their memory in all phases.

The estimate adds the sizes of tensors, for the longest samples that the configuration allows. The memory of CUDA, NCCL
and graphs is an assumption (`RESERVES`), and fragmentation is assumed to cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from respec_trainer.config import Config
from respec_trainer.drafter.online.buffer import MB
from respec_trainer.drafter.shape import VOCABULARY_MULTIPLE, DrafterShape
from respec_trainer.dtypes import DTYPES
from respec_trainer.plan.learner import learner_parts, learns
from respec_trainer.plan.part import PHASES, Part, Phase
from respec_trainer.plan.places import Layout
from respec_trainer.plan.sizes import DRAFT_VOCABULARY, FLOAT, ActorSizes, DrafterSizes, cache_bytes
from respec_trainer.plan.zero import ZeroSizes
from respec_trainer.speculation.algorithms import DrafterFolder, algorithm_of
from respec_trainer.speculation.profiling.settings import longest_sequence

GB = 1 << 30
# Assumed, not measured: CUDA context, NCCL buffers and workspaces of a trainer rank; the same and graphs of an engine.
RESERVES = {"trainer": 3 * GB // 2, "engine": 5 * GB // 2}
# Parts that move to host memory while colocated engines generate.
MOVED = ("actor: weights", "actor: optimizer", "actor: gradients")
PREFILL = 8192  # tokens that sglang 0.5.21 reads in one pass


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one of the GPUs that train, that generate, or that do both.

    The engine's key/value cache holds `pool_tokens`, None without an engine. `host` is the host memory in bytes that
    belongs to each such GPU.
    """

    name: str  # what the GPU does
    parts: tuple[Part, ...]
    gpu: int
    longest: int  # tokens of a sample
    pool_tokens: int | None
    host: int

    def total(self, phase: Phase) -> int:
        return sum(part.bytes for part in self.parts if phase in part.phases)

    def problems(self) -> list[str]:
        """Return an error text for each phase or cache that does not fit, with the remedy."""
        remedies = {
            "generate": "lower rollout.engine.mem_fraction, rollout.engine.max_running_requests or "
            "drafter.micro_batch_size",
            "train": "lower actor.micro_batch_size or actor.logprob_chunk, set actor.recompute=true, raise "
            "actor.parallel.tp or actor.zero.stage, or take more GPUs",
            "resync": "lower resync.bucket_mb, or raise actor.parallel.tp",
        }
        found = [
            f"memory: on a GPU that {self.name}, phase {phase} takes {self.total(phase) / GB:.1f} of "
            f"{self.gpu / GB:.0f} GB; {remedy}"
            for phase, remedy in remedies.items()
            if self.total(phase) > self.gpu
        ]
        if self.pool_tokens is not None and self.pool_tokens < self.longest:
            found.append(
                f"memory: the key/value cache holds {self.pool_tokens} tokens, but a sample may have "
                f"{self.longest}; raise rollout.engine.mem_fraction or rollout.engine.tp, or lower "
                "rollout.sampling.max_new_tokens"
            )
        return found


def plan_memory(
    config: Config, hf_config, layout: Layout, gpu_bytes: int, draft_vocab: int | None = None
) -> list[MemoryPlan]:
    """Return a plan for each kind of GPU of `gpu_bytes`: one if engines and trainer share GPUs, otherwise two.

    Args:
        draft_vocab: the size of the drafter's vocabulary; None: unknown, use DRAFT_VOCABULARY.
    """
    width = DTYPES[config.model.dtype].itemsize
    longest = longest_sequence(config, hf_config)
    drafter = drafter_sizes(config, hf_config, draft_vocab)
    trainer = [
        Part("trainer: CUDA, NCCL", RESERVES["trainer"], PHASES, "assumed"),
        *_actor_parts(config, hf_config, layout, longest, width),
        *learner_parts(config, drafter, longest),
    ]
    engine = _engine_parts(config, hf_config, drafter, width)
    # The memory that is taken when the engine starts.
    taken = sum(part.bytes for part in trainer if part.phases == PHASES) if layout.colocated else 0
    cell = cache_bytes(hf_config, config.rollout.engine.tp, width)
    cell += cell // hf_config.num_hidden_layers if drafter else 0  # the drafter has one layer
    tokens = _pool_tokens(config, engine, gpu_bytes - taken, cell)
    how = f"{tokens:,} x {cell:,} bytes"
    engine.append(Part("engine: key/value cache", tokens * cell, ("generate",), how))
    host = config.drafter.memory_mb * MB if learns(config) else 0
    if layout.colocated:
        host += sum(part.bytes for part in trainer if part.name in MOVED)
        return [MemoryPlan("trains and generates", (*trainer, *engine), gpu_bytes, longest, tokens, host)]
    trainer = [replace(part, phases=PHASES) if part.name in MOVED else part for part in trainer]
    engine = [replace(part, phases=PHASES) for part in engine]
    return [
        MemoryPlan("trains", tuple(trainer), gpu_bytes, longest, None, host),
        MemoryPlan("generates", tuple(engine), gpu_bytes, longest, tokens, 0),
    ]


def drafter_sizes(config: Config, hf_config, draft_vocab: int | None) -> DrafterSizes | None:
    """Return the sizes of the EAGLE-3 drafter; None if the algorithm has none."""
    if algorithm_of(config.speculation).folder is not DrafterFolder.EAGLE3:
        return None
    size = draft_vocab or min(DRAFT_VOCABULARY, hf_config.vocab_size // VOCABULARY_MULTIPLE * VOCABULARY_MULTIPLE)
    return DrafterSizes(DrafterShape.for_target(hf_config, size))


def _actor_parts(config: Config, hf_config, layout: Layout, longest: int, width: int) -> list[Part]:
    actor, settings = ActorSizes(hf_config, layout.tp, width), config.actor
    zero = ZeroSizes(actor.parameters, width, layout.dp, settings.zero.stage, actor.largest_parameter())
    tokens = settings.micro_batch_size * longest
    activations = actor.activations(tokens, settings.recompute, settings.parallel.sequence_parallel)
    truncates = config.rollout.sampling.truncates and not config.rollout.sampling.allow_untruncated
    logits = actor.logits(settings.logprob_chunk, truncates)
    bucket = 2 * config.resync.bucket_mb * MB
    how = f"{actor.parameters / 1e9:.2f}e9 numbers a rank"
    kept = "layers' inputs and one layer" if settings.recompute else "every layer"
    return [
        Part("actor: weights", zero.weights, ("train", "resync"), f"{how}, {zero.how['weights']}"),
        Part("actor: optimizer", zero.optimizer, ("train",), zero.how["optimizer"]),
        Part("actor: gradients", zero.gradients, ("train",), zero.how["gradients"]),
        Part("actor: buffers of an update", zero.update, ("train",), zero.how["update"]),
        Part("actor: activations", activations, ("train",), f"{kept}, {tokens:,} tokens"),
        Part("actor: logits", logits, ("train",), f"{settings.logprob_chunk} tokens"),
        Part("resync: buckets", bucket, ("resync",), f"2 x {config.resync.bucket_mb} MB"),
    ]


def _engine_parts(config: Config, hf_config, drafter: DrafterSizes | None, width: int) -> list[Part]:
    """An engine's parts without the key/value cache. A sleeping engine keeps its context and graphs."""
    engine, phases = config.rollout.engine, ("generate", "resync")
    weights = ActorSizes(hf_config, engine.tp, width).parameters * width
    drafted = config.speculation.draft_tokens if algorithm_of(config.speculation).drafts else 1
    rows = engine.max_running_requests * drafted
    # One pass over a prompt's chunk, then logits in the model's dtype and twice in float32.
    prefill = PREFILL * (3 * hf_config.intermediate_size // engine.tp + 4 * hf_config.hidden_size) * width
    logits = rows * hf_config.vocab_size * (width + 2 * FLOAT)
    parts = [
        Part("engine: CUDA, graphs", RESERVES["engine"], PHASES, "assumed"),
        Part("engine: weights", weights, phases, f"engine tp {engine.tp}"),
        Part("engine: one pass", max(prefill, logits), ("generate",), f"{PREFILL} tokens or {rows} logits"),
    ]
    if drafter:
        size = drafter.parameters * width // engine.tp
        parts.append(Part("engine: drafter", size, phases, f"draft vocabulary {drafter.shape.draft_vocab_size:,}"))
    return parts


def _pool_tokens(config: Config, engine: list[Part], free: int, cell: int) -> int:
    """Tokens of the cache: sglang gives weights and cache `mem_fraction` of the memory that is free at its start."""
    settings = config.rollout.engine
    standing = [part.bytes for part in engine if "resync" in part.phases]  # the engine's reserve, then its weights
    tokens = max(0, int(settings.mem_fraction * (free - standing[0])) - sum(standing[1:])) // cell
    return tokens if settings.max_total_tokens is None else min(tokens, settings.max_total_tokens)
