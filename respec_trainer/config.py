"""The schema of the configuration: typed sections, their defaults, and the combinations that cannot work.

`config_file.py` reads a file into this schema. Only checks that need nothing but the file are here. Checks that depend
on the speculation algorithm are in `speculation/algorithms/`, those that depend on files or the machine in
`preflight/`.
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
    """A group of keys. Unknown keys and wrong types are errors; values never change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    dir: str = "runs"
    steps: PositiveInt
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # The run stops after this many steps in a row with a loss or gradient that is not finite. Each such step is
    # refused: it changes nothing, and its batch is saved.
    max_bad_steps: PositiveInt = 3
    # Seconds without a message after which a rank, its host or the link to it counts as gone.
    lost_after: Annotated[float, Field(ge=1, le=600)] = 30.0
    # The most seconds that one phase may take, generation included. Collectives end with an error after twice as long.
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
    marker: str = "####"  # exact_answer: the text before an answer; the answer follows the last marker
    # kind "function": "path/to/file.py:name" of a function (response text, reference answer) -> number, or of a
    # function (items) -> list of numbers
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
    top_k: int = -1  # -1: no limit
    # true: log-probs are of the whole vocabulary although top_k or top_p truncate what is sampled. The policy that is
    # trained is then not the one that samples. Draft sources that cannot report truncated log-probs need it.
    allow_untruncated: bool = False
    max_new_tokens: PositiveInt
    stop: list[str] = []
    seeded: bool = False  # every draw depends only on run.seed, step, prompt and index in the group

    @property
    def truncates(self) -> bool:
        """True if top_k or top_p leave out a part of the vocabulary."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def untruncated(self) -> bool:
        """True if the log-probs are of the whole vocabulary, and the samples are not."""
        return self.truncates and self.allow_untruncated

    @model_validator(mode="after")
    def _responses_can_differ(self) -> SamplingConfig:
        if self.top_k < -1 or self.top_k in (0, 1):
            raise ValueError(
                f"top_k={self.top_k} must be -1 (no limit) or at least 2: with one token to choose from, the responses "
                "to a prompt are all alike, so every advantage is zero"
            )
        return self


class EngineConfig(Section):
    tp: PositiveInt = 1  # devices (tensor-parallel ranks) of one engine
    span: PositiveInt | None = None  # ranks that share one engine; default: tp; on a CPU usually all ranks
    max_running_requests: PositiveInt = 64  # responses (slots) that one engine decodes at the same time
    min_free_slots: PositiveInt = 1  # waiting responses start together when so many slots are free
    max_total_tokens: PositiveInt | None = None  # tokens in the KV cache; default: from mem_fraction
    mem_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5  # share of a GPU for the engine's weights and KV cache
    threads: PositiveInt = 1  # OpenMP threads of each engine process, without a GPU
    timeout: PositiveFloat = 600.0  # seconds without an answer before the engine counts as hung
    max_restarts: NonNegativeInt = 3  # restarts of dead engines in one generation phase, before the run ends
    # After the death of an engine. tokens: continue from the tokens so far, which costs a message for each forward
    # pass. start: draw the engine's responses again.
    resume: Literal["tokens", "start"] = "start"
    log_level: Literal["debug", "info", "warning", "error"] = "error"

    @model_validator(mode="after")
    def _slots_can_be_free(self) -> EngineConfig:
        if self.min_free_slots > self.max_running_requests:
            raise ValueError(
                f"min_free_slots={self.min_free_slots} can never be free of "
                f"max_running_requests={self.max_running_requests}: set it to {self.max_running_requests} or less"
            )
        return self


class RolloutConfig(Section):
    samples_per_prompt: Annotated[int, Field(ge=2)]  # responses to one prompt, the group that advantages compare
    # colocated: engines and actor share the devices of all ranks. disaggregated: the last engine_ranks ranks only hold
    # engines, the other ranks only train.
    placement: Literal["colocated", "disaggregated"] = "colocated"
    engine_ranks: NonNegativeInt = 0
    # The responses of one engine. group: all responses to a prompt, which the engine reads once. spread: responses to
    # one prompt may go to several engines.
    deal: Literal["group", "spread"] = "group"
    hand_over: bool = True  # responses that wait for one engine move to another that has free slots first
    sampling: SamplingConfig
    audit_every: NonNegativeInt = 0  # steps from one test of the samples' distribution to the next; 0: never
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _engines_have_ranks(self) -> RolloutConfig:
        if (self.placement == "disaggregated") != (self.engine_ranks > 0):
            raise ValueError(
                f"placement={self.placement} with engine_ranks={self.engine_ranks}: disaggregated engines need ranks, "
                "colocated ones are on all; set both, or neither"
            )
        return self


class SpeculationConfig(Section):
    algorithm: str = "eagle3"  # a name in speculation/algorithms/
    steps: PositiveInt = 3  # s: draft steps; with policy "adaptive" the most draft steps
    topk: PositiveInt = 1  # t: branches in each step; 1: a chain
    draft_tokens: PositiveInt = 4  # n: tokens verified in one target pass, including the root
    # true: drafts are sampled and accepted with probability min(1, p/q). false: the likeliest tokens are the drafts,
    # accepted with probability p.
    rejection_sampling: bool = False
    accept_threshold_single: Threshold = 1.0  # below 1: accept drafts of at least this probability
    accept_threshold_acc: Threshold = 1.0  # below 1: accept drafts with probability p / threshold
    allow_lossy: bool = False  # allow thresholds below 1: samples then do not follow the policy's distribution
    # fixed: always `steps` draft steps. adaptive: before every decode batch the fastest of `candidates`, as predicted
    # by `profile`; for chains only.
    policy: Literal["fixed", "adaptive"] = "fixed"
    profile: str | None = None  # adaptive: a file of tools/profile_speculation.py
    # adaptive: numbers of draft steps to choose from; default: 0 and those of the profile.
    candidates: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    explore: Annotated[float, Field(ge=0, le=0.1)] = 0.005  # adaptive: share of the time for trying more steps
    # While 0 steps are chosen, the drafter reads each new token at once (warm), or all of them when drafting starts
    # again (defer).
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
            raise ValueError(f"candidates={candidates} must rise, and not be only 0: such as [0, 1, {self.steps}]")
        if candidates[-1] > self.steps:
            raise ValueError(
                f"candidates={candidates} go beyond steps={self.steps}, the most draft steps: set "
                f"steps={candidates[-1]} and draft_tokens={candidates[-1] + 1}, or fewer candidates"
            )


class DrafterConfig(Section):
    path: str | None = None  # an EAGLE-3 folder in SGLang's format; for standalone: a Hugging Face model folder
    # The weight of each response in the drafter's loss; "none": the drafter does not learn during the run.
    weighting: Literal["none", "uniform", "reward", "advantage"] = "none"
    weight_scope: Literal["batch", "group"] = "batch"  # the responses over which rewards are normalized
    loss: Literal["kl", "acceptance", "log_acceptance", "mixed"] = "kl"
    mode: Literal["async", "sync"] = "async"  # learn while the engines generate, or while they wait
    # interval: train every `interval` iterations. need: train when accept length has fallen by `delta`.
    cadence: Literal["interval", "need"] = "interval"
    interval: PositiveInt = 1  # iterations from one training to the next; each trains on 1 / interval of the buffer
    delta: PositiveFloat = 0.1  # cadence "need": the fall of accept length, in tokens, that starts a training
    unroll: PositiveInt = 5  # draft steps simulated in training
    decay: Annotated[float, Field(gt=0, le=1)] = 0.8  # factor from a draft step's weight in the loss to the next step's
    batch_size: PositiveInt = 32  # responses in one update, over all ranks
    micro_batch_size: PositiveInt = 8  # responses in one forward pass, on each rank
    lr: PositiveFloat = 5.0e-4  # AdamW, for norms and the output layer; for everything if matrix_lr is null
    matrix_lr: PositiveFloat | None = 5.0e-3  # Muon, for the drafter's other matrices
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0  # largest global gradient norm
    warmup_updates: NonNegativeInt = 10  # updates over which the learning rates rise
    memory_mb: PositiveInt = 1024  # memory of each rank for drafter, optimizer, and rollouts to learn from
    # Also measure the initial drafter on the same responses, which shows the gain by learning.
    compare_frozen: bool = False
    retention: Literal["recency", "reservoir"] = "recency"  # rollouts kept: the newest, or a random sample of all
    max_bad_updates: PositiveInt = 3  # after so many non-finite updates in a row the drafter stops learning


class ParallelConfig(Section):
    tp: PositiveInt = 1  # tensor-parallel ranks; the others are data-parallel
    sequence_parallel: bool = False


class ZeroConfig(Section):
    stage: Literal[1, 2, 3] = 1


class OptimConfig(Section):
    lr: PositiveFloat = 1.0e-6
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0  # largest global gradient norm
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_lr_ratio: Fraction = 0.0  # the last learning rate of linear and cosine, as a share of lr


class ActorConfig(Section):
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    optim: OptimConfig = OptimConfig()
    micro_batch_size: PositiveInt = 8  # sequences in one forward pass, on each data-parallel rank
    recompute: bool = False  # recompute activations of every layer in the backward pass
    logprob_chunk: PositiveInt = 1024  # tokens whose logits are in memory at one time


class ObjectiveConfig(Section):
    kind: str = "grpo"  # a name in respec_trainer/objective/registry.py
    advantage: Literal["group_norm", "group_mean"] = "group_norm"  # with or without dividing by the group's std
    aggregation: Literal["token", "sequence"] = "token"  # mean over all tokens, or over the means of the responses
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    minibatches: PositiveInt = 1  # optimizer updates in one step
    correction: Literal["none", "tis", "token_mask", "sequence_mask"] = "tis"  # for sampler-to-actor mismatch
    tis_clip: PositiveFloat = 2.0  # tis: largest importance ratio
    mask_low: Annotated[float, Field(gt=0, lt=1)] = 0.5  # the masks keep ratios from mask_low to mask_high
    mask_high: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0


class ResyncConfig(Section):
    transport: Literal["auto", "gloo", "nccl", "cuda_ipc"] = "auto"
    bucket_mb: Annotated[int, Field(ge=1, le=512)] = 256  # MB of weights sent at one time
    port: Port | None = None  # where trainer and engines connect; default: a free port
    timeout: PositiveFloat = 300.0  # seconds for a bucket to arrive, and for every rank to take part
    # checksum: compare digests of every tensor in trainer and engine. full: also compare the log-probs of a few greedy
    # tokens (the canary).
    verify: Literal["off", "checksum", "full"] = "full"
    canary_tokens: PositiveInt = 4
    canary_tolerance: PositiveFloat | None = None  # largest difference, in nats; default: 0.25 in bf16, 0.01 in fp32
    accept_alarm: Fraction = 0.3  # notify the user if accepted drafts fall by this share right after a push


class CheckpointConfig(Section):
    every: NonNegativeInt = 0  # steps from one save to the next; the last step is saved too; 0: never save
    background: bool = True  # write while training continues; false: training waits until the files are on the disk
    keep: PositiveInt = 2  # number of newest checkpoints to keep
    keep_best: NonNegativeInt = 0  # number of checkpoints with the highest best_metric to keep as well
    best_metric: str = "reward/mean"  # a name in metrics.jsonl
    # auto: continue the newest run of this name that has checkpoints, if there is one. never: start a new run. Any
    # other value: the folder of a run or of one checkpoint, from which a new run starts.
    resume: str = "auto"
    export_at_end: bool = True  # write actor (a Hugging Face folder) and drafter into the run's folder


class TelemetryConfig(Section):
    # Writers of each step's metrics: names in telemetry/trackers.py. jsonl is required: resuming, the summary and the
    # web page read its file.
    trackers: list[str] = ["jsonl", "tensorboard"]
    samples_per_step: NonNegativeInt = 2  # responses written to samples.jsonl
    traces: NonNegativeInt = 0  # number of newest steps whose lengths and timelines are kept; 0: all
    live: Literal["auto", "panel", "lines", "off"] = "auto"


class Config(Section):
    """The whole configuration of a run. Saved, with all defaults, as `config.yaml` in the run's folder."""

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
                "resync.transport=cuda_ipc needs a device that engine and trainer share, and with "
                "rollout.placement=disaggregated they share none: use nccl (or auto)"
            )
        return self

    @model_validator(mode="after")
    def _engines_hang_before_ranks_do(self) -> Config:
        timeouts = {"rollout.engine.timeout": self.rollout.engine.timeout, "resync.timeout": self.resync.timeout}
        for key, seconds in timeouts.items():
            if self.run.hang_timeout <= seconds:
                raise ValueError(
                    f"run.hang_timeout={self.run.hang_timeout:g} would end the run before {key}={seconds:g} can show "
                    f"that only an engine hangs, which is restarted: make it more than {seconds:g}, or {key} less"
                )
        return self

    @model_validator(mode="after")
    def _seeds_fix_every_draw(self) -> Config:
        if self.rollout.sampling.seeded and self.speculation.rejection_sampling:
            raise ValueError(
                "rollout.sampling.seeded does not seed the draws of the drafter under speculation.rejection_sampling; "
                "set one of them to false"
            )
        return self
