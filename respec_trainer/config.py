"""The schema of the configuration: typed sections, their defaults, and the combinations that cannot work.

`config_file.py` reads a file into it. Only what the file itself decides is checked here. What depends on the
speculation algorithm is checked by `speculation/algorithms/`, what depends on files and machine by `preflight/`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Threshold = Annotated[float, Field(gt=0, le=1)]
Port = Annotated[int, Field(ge=1024, le=65535)]
DType = Literal["bf16", "fp32"]


class Section(BaseModel):
    """A group of keys. Unknown keys and wrong types are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    dir: str = "runs"
    steps: PositiveInt
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Steps in a row whose loss or gradient was not finite before the run stops. Each such step is refused and its
    # batch saved.
    max_bad_steps: PositiveInt = 3
    # Seconds without a sign of life after which a rank, its host or the link to it counts as gone.
    lost_after: Annotated[float, Field(ge=1, le=600)] = 30.0
    # Seconds that a phase may take, generation too. Collectives give up by themselves after twice as long.
    hang_timeout: PositiveFloat = 1800.0


class ModelConfig(Section):
    path: str  # a Hugging Face folder: config.json, safetensors, tokenizer
    dtype: DType = "bf16"


class DataConfig(Section):
    path: str  # .jsonl or .parquet
    prompt_column: str = "question"
    answer_column: str = "answer"
    template: str = "{prompt}"
    prompts_per_step: PositiveInt
    max_prompt_tokens: PositiveInt = 1024
    shuffle: bool = True

    @model_validator(mode="after")
    def _template_has_a_prompt(self) -> DataConfig:
        if "{prompt}" not in self.template:
            raise ValueError("template must contain {prompt}, where the prompt column's text goes")
        return self


class RewardConfig(Section):
    kind: str = "exact_answer"  # a name in rewards/registry.py
    marker: str = "####"  # exact_answer: the answer is what follows the last marker
    # function: "path/to/file.py:name" of (response text, reference answer) -> number, or of (items) -> list of numbers
    function: str | None = None

    @model_validator(mode="after")
    def _marker_marks(self) -> RewardConfig:
        if not self.marker.strip():
            raise ValueError(f"marker={self.marker!r} marks nothing: give the text that comes before an answer")
        return self

    @model_validator(mode="after")
    def _function_is_named(self) -> RewardConfig:
        if (self.kind == "function") != (self.function is not None):
            raise ValueError("kind=function and function=FILE.py:NAME go together: give both or neither")
        return self


class SamplingConfig(Section):
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1  # -1: no limit
    max_new_tokens: PositiveInt
    stop: list[str] = []
    seeded: bool = False  # every draw is a function of run.seed, step, prompt and place in the group


class EngineConfig(Section):
    tp: PositiveInt = 1  # devices one engine spans
    span: PositiveInt | None = None  # trainer ranks that share one engine; default tp. On a CPU: usually all ranks.
    max_running_requests: PositiveInt = 64
    min_free_slots: PositiveInt = 1  # of them, before waiting responses start and have their prompts read together
    max_total_tokens: PositiveInt | None = None  # KV pool; default: from mem_fraction
    mem_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    threads: PositiveInt = 1  # OpenMP threads of each engine process, without a GPU
    timeout: PositiveFloat = 600.0  # seconds without an answer before the engine counts as hung
    max_restarts: NonNegativeInt = 3  # times in one generation phase that dead engines are started anew
    # After a death: go on from the tokens so far, which costs a message a pass, or draw the engine's share again.
    resume: Literal["tokens", "start"] = "start"
    log_level: Literal["debug", "info", "warning", "error"] = "error"

    @model_validator(mode="after")
    def _slots_can_be_free(self) -> EngineConfig:
        if self.min_free_slots > self.max_running_requests:
            raise ValueError(
                f"min_free_slots={self.min_free_slots} are never free of "
                f"max_running_requests={self.max_running_requests}"
            )
        return self


class RolloutConfig(Section):
    samples_per_prompt: Annotated[int, Field(ge=2)]
    # colocated: engines and actor share all ranks' devices. disaggregated: the last engine_ranks ranks hold engines.
    placement: Literal["colocated", "disaggregated"] = "colocated"
    engine_ranks: NonNegativeInt = 0
    # Which responses one engine draws. group: all to one prompt, which it reads once. spread: each goes where it fits.
    deal: Literal["group", "spread"] = "group"
    hand_over: bool = True  # responses that wait for an engine's room go to another that has room earlier
    sampling: SamplingConfig
    audit_every: NonNegativeInt = 0  # steps from one test of the samples' law to the next; 0: never
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _engines_have_ranks(self) -> RolloutConfig:
        if (self.placement == "disaggregated") != (self.engine_ranks > 0):
            raise ValueError(
                f"placement={self.placement} with engine_ranks={self.engine_ranks}: disaggregated engines need ranks, "
                "colocated ones are on all; set both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _there_is_one_law_to_audit(self) -> RolloutConfig:
        if self.audit_every and self.sampling.top_k > 0 and self.sampling.top_p < 1:
            raise ValueError(
                "audit_every knows top_k or top_p, not both: sglang applies them together without drafts, but one "
                "after the other when it verifies; set one of them, or audit_every=0"
            )
        return self


class SpeculationConfig(Section):
    algorithm: str = "eagle3"  # what drafts: a name in speculation/algorithms/, whose checks load_config runs
    steps: PositiveInt = 3  # s: draft steps
    topk: PositiveInt = 1  # t: branches a step
    draft_tokens: PositiveInt = 4  # n: tokens verified in one target pass, the root included
    rejection_sampling: bool = False  # drafts are drawn, and accepted by min(1, p/q); else chosen, and accepted by p
    accept_threshold_single: Threshold = 1.0  # below 1: accept drafts at least as probable as this
    accept_threshold_acc: Threshold = 1.0  # below 1: accept drafts with p / threshold
    allow_lossy: bool = False  # whether the thresholds may be below 1
    # fixed: always `steps`. adaptive: before every decode batch the best of `candidates` by `profile`; chains only.
    policy: Literal["fixed", "adaptive"] = "fixed"
    profile: str | None = None  # adaptive: what drafting and verifying cost, by tools/profile_speculation.py
    candidates: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None  # default: 0 and the profile's
    explore: Annotated[float, Field(ge=0, le=0.1)] = 0.005  # share of the time for trying what may have become better
    # At 0 steps the drafter reads a token when it is drawn (warm), or all when speculation goes on (defer).
    off: Literal["defer", "warm"] = "defer"

    @model_validator(mode="after")
    def _steps_can_adapt(self) -> SpeculationConfig:
        if self.policy == "fixed":
            if self.profile is not None or self.candidates is not None:
                raise ValueError("profile and candidates are for policy=adaptive: set it, or leave them out")
            return self
        if self.profile is None:
            raise ValueError("policy=adaptive needs profile: measure one with tools/profile_speculation.py")
        if self.candidates is not None:
            self._check_candidates(self.candidates)
        return self

    def _check_candidates(self, candidates: list[int]) -> None:
        if sorted(set(candidates)) != candidates or candidates[-1] == 0:
            raise ValueError(f"candidates={candidates} must rise, and not be 0 alone: such as [0, 1, {self.steps}]")
        if candidates[-1] > self.steps:
            raise ValueError(
                f"candidates={candidates} go beyond steps={self.steps}, the most that are drafted: set "
                f"steps={candidates[-1]} and draft_tokens={candidates[-1] + 1}, or fewer candidates"
            )


class DrafterConfig(Section):
    path: str | None = None  # an EAGLE-3 folder in SGLang's format; for standalone: a Hugging Face model folder
    # How much each response counts in the drafter's loss; "none": the drafter stays as it is during the run.
    weighting: Literal["none", "uniform", "reward", "advantage"] = "none"
    weight_scope: Literal["batch", "group"] = "batch"  # what rewards are normalized over
    loss: Literal["kl", "acceptance", "log_acceptance", "mixed"] = "kl"
    mode: Literal["async", "sync"] = "async"  # learn while the engines generate, or while they wait
    cadence: Literal["interval", "need"] = "interval"
    interval: PositiveInt = 1  # iterations from one training to the next, each on 1 / interval of the buffer
    delta: PositiveFloat = 0.1  # cadence "need": by how much accept length must have fallen
    unroll: PositiveInt = 5  # draft steps simulated in training
    decay: Annotated[float, Field(gt=0, le=1)] = 0.8  # of a draft step's weight in the loss, per step
    batch_size: PositiveInt = 32  # responses an update, of all ranks
    micro_batch_size: PositiveInt = 8  # responses one forward pass holds, each rank
    lr: PositiveFloat = 5.0e-4  # AdamW: norms and the output layer, or everything if matrix_lr is null
    matrix_lr: PositiveFloat | None = 5.0e-3  # Muon: the drafter's other matrices
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0  # global gradient norm
    warmup_updates: NonNegativeInt = 10  # over which the rates rise
    memory_mb: PositiveInt = 1024  # of each rank: drafter, optimizer, and rollouts to learn from
    # Also measure the drafter that the run began with on the same responses: what learning has won.
    compare_frozen: bool = False
    retention: Literal["recency", "reservoir"] = "recency"  # what stays: the newest, or a fair sample of all
    max_bad_updates: PositiveInt = 3  # in a row that were not finite, before the drafter stays as it is


class ParallelConfig(Section):
    tp: PositiveInt = 1
    sequence_parallel: bool = False


class ZeroConfig(Section):
    stage: Literal[1, 2, 3] = 1


class OptimConfig(Section):
    lr: PositiveFloat = 1.0e-6
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0  # global gradient norm
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_lr_ratio: Fraction = 0.0  # where linear and cosine end, as a share of lr


class ActorConfig(Section):
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    optim: OptimConfig = OptimConfig()
    micro_batch_size: PositiveInt = 8  # sequences one forward pass holds, each data-parallel rank
    recompute: bool = False  # recompute activations of every layer in the backward pass
    logprob_chunk: PositiveInt = 1024  # tokens whose logits exist at one time


class ObjectiveConfig(Section):
    kind: str = "grpo"  # a name in respec_trainer/objective/registry.py
    advantage: Literal["group_norm", "group_mean"] = "group_norm"  # with or without dividing by the group's std
    aggregation: Literal["token", "sequence"] = "token"  # mean over all tokens, or over each response's own mean
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    minibatches: PositiveInt = 1  # optimizer updates a step
    correction: Literal["none", "tis", "token_mask", "sequence_mask"] = "tis"  # sampler-to-actor mismatch
    tis_clip: PositiveFloat = 2.0
    mask_low: Annotated[float, Field(gt=0, lt=1)] = 0.5  # bounds of the ratio that the masks let through
    mask_high: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0


class ResyncConfig(Section):
    transport: Literal["auto", "gloo", "nccl", "cuda_ipc"] = "auto"
    bucket_mb: Annotated[int, Field(ge=1, le=512)] = 256
    port: Port | None = None  # rendezvous of trainer and engines; default: a free one
    timeout: PositiveFloat = 300.0  # seconds for a bucket to arrive, and for every rank to take part
    # checksum: digests of every tensor, here and in the engine. full: and a canary, whose greedy log-probs must agree.
    verify: Literal["off", "checksum", "full"] = "full"
    canary_tokens: PositiveInt = 4
    canary_tolerance: PositiveFloat | None = None  # nats; default: 0.25 in bf16, 0.01 in fp32
    accept_alarm: Fraction = 0.3  # share of the accepted drafts whose loss with a push is told to the user


class CheckpointConfig(Section):
    every: NonNegativeInt = 0  # steps from one save to the next, and one after the last step; 0: never
    background: bool = True  # write while training goes on; false: training waits until the files are on the disk
    keep: PositiveInt = 2  # newest checkpoints
    keep_best: NonNegativeInt = 0  # besides, those of the steps with the highest best_metric
    best_metric: str = "reward/mean"  # a name in metrics.jsonl
    # auto: go on with the newest run of this name that has checkpoints, if there is one. never: a new run. Else the
    # folder of a run, or of one checkpoint: a new run that begins there.
    resume: str = "auto"
    export_at_end: bool = True  # write actor (a Hugging Face folder) and drafter into the run's folder


class TelemetryConfig(Section):
    # Where each step's metrics go: names in telemetry/trackers.py. jsonl must be one: resume, summary and page read it.
    trackers: list[str] = ["jsonl", "tensorboard"]
    samples_per_step: NonNegativeInt = 2
    traces: NonNegativeInt = 0  # newest steps whose lengths and timelines are kept; 0: all
    live: Literal["auto", "panel", "lines", "off"] = "auto"


class Config(Section):
    """Everything a run is made of. Saved, resolved, as `config.yaml` in the run's folder."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig
    speculation: SpeculationConfig = SpeculationConfig()
    drafter: DrafterConfig = DrafterConfig()
    actor: ActorConfig = ActorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    resync: ResyncConfig = ResyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def samples_per_step(self) -> int:
        return self.data.prompts_per_step * self.rollout.samples_per_prompt

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        if self.samples_per_step % self.objective.minibatches:
            raise ValueError(
                f"objective.minibatches={self.objective.minibatches} must divide data.prompts_per_step x "
                f"rollout.samples_per_prompt = {self.samples_per_step}"
            )
        if self.actor.parallel.sequence_parallel and self.actor.parallel.tp == 1:
            raise ValueError("actor.parallel.sequence_parallel needs actor.parallel.tp >= 2")
        if self.rollout.sampling.temperature == 0:
            raise ValueError(
                "rollout.sampling.temperature must be > 0: greedy rollouts of one prompt are all alike, "
                "so every advantage is zero"
            )
        return self

    @model_validator(mode="after")
    def _weights_reach_the_engines(self) -> Config:
        if self.rollout.engine_ranks and self.resync.transport == "cuda_ipc":
            raise ValueError(
                "resync.transport=cuda_ipc hands over memory of a device that engine and trainer share, and with "
                "rollout.placement=disaggregated they share none: use nccl (or auto)"
            )
        return self

    @model_validator(mode="after")
    def _engines_hang_before_ranks_do(self) -> Config:
        timeouts = {"rollout.engine.timeout": self.rollout.engine.timeout, "resync.timeout": self.resync.timeout}
        for key, seconds in timeouts.items():
            if self.run.hang_timeout <= seconds:
                raise ValueError(
                    f"run.hang_timeout={self.run.hang_timeout:g} would end the run before {key}={seconds:g} can tell "
                    f"that only an engine hangs, which is restarted: make it more than {seconds:g}, or {key} less"
                )
        return self

    @model_validator(mode="after")
    def _seeds_fix_every_draw(self) -> Config:
        if self.rollout.sampling.seeded and self.speculation.rejection_sampling:
            raise ValueError(
                "rollout.sampling.seeded does not reach the drafter, which draws under speculation.rejection_sampling; "
                "set one of them to false"
            )
        return self
