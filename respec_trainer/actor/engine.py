"""Actor: the policy in a DeepSpeed engine. The training loop calls `infer` and `update`.

There is no pipeline or context parallelism: a rank holds its part of every layer, and whole sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from respec_trainer.actor.capture import captured_rows, to_host, vocabulary_rows
from respec_trainer.actor.finite import step_if_finite
from respec_trainer.actor.loading import load_hf_config, load_weights
from respec_trainer.actor.microbatch import micro_batches
from respec_trainer.actor.model import build_model
from respec_trainer.actor.offload import Offload, Part
from respec_trainer.actor.optim import learning_rate_factor, setup_optimizer
from respec_trainer.actor.parallel import DeepSpeedMpu, Topology
from respec_trainer.actor.state import ActorState, ReadFragment
from respec_trainer.capture import Captured, CapturedRow, Wanted
from respec_trainer.checkpoint.fragments import SavedActor
from respec_trainer.config import Config
from respec_trainer.dtypes import DTYPES
from respec_trainer.errors import TrainingError
from respec_trainer.objective.inputs import LossInputs
from respec_trainer.objective.metrics import Metrics, PerUpdate, finish, merge, pack, unpack
from respec_trainer.objective.registry import setup_objective
from respec_trainer.rollout.batch import Batch


class NonFiniteStep(TrainingError):
    """A loss or gradient was NaN or infinite on some rank. Raised on every rank; the update changed nothing."""


@dataclass(frozen=True)
class Inference:
    """The policy's scores of a batch. Entry t is for token t given those before it; 0 outside the response."""

    logprobs: torch.Tensor  # [B, S] float32, at the sampling temperature, after top_k and top_p
    entropy: torch.Tensor  # [B, S] float32
    captured: Captured | None = None  # the data that a learner requested


class Actor:
    """The policy on this rank. Every method is collective: all ranks call it in the same order."""

    def __init__(self, config: Config, topology: Topology, total_updates: int):
        """Build the model, load this rank's shards from `model.path`, and wrap it for training.

        Args:
            total_updates: optimizer updates of the whole run, for the learning rate schedule.
        """
        self.config, self.topology = config, topology
        self.objective = setup_objective(config.objective)
        self.hf_config = load_hf_config(config.model.path)
        self.multiple_of = topology.tp if config.actor.parallel.sequence_parallel else 1
        dtype = DTYPES[config.model.dtype]
        model = build_model(self.hf_config, config.actor, dtype, topology.device, config.rollout.sampling)
        load_weights(model, self.hf_config, config.model.path, topology)
        optim = config.actor.optim
        optimizer = setup_optimizer(model.parameters(), optim)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(optim, step, total_updates)
        )
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            mpu=DeepSpeedMpu(),
            config=deepspeed_settings(config),
            dist_init_required=False,
        )
        self._room = Offload(self.engine)
        self._state = ActorState(self.engine, topology, self._room)

    @property
    def updates(self) -> int:
        """Optimizer updates applied so far; refused ones do not count."""
        return self.engine.global_steps - self.engine.skipped_steps

    @property
    def version(self) -> str:
        """The version of the weights, such as "actor-3"; a refused update does not change it."""
        return f"actor-{self.updates}"

    def offload(self, part: Part | None = None) -> None:
        """Free the GPU memory of "optimizer" (with the gradients), then of "weights"; None: both. See `offload.py`."""
        for wanted in ("optimizer", "weights") if part is None else (part,):
            self._room.out(wanted)

    def onload(self, part: Part | None = None) -> None:
        """Bring back "weights", then "optimizer"; None: both."""
        for wanted in ("weights", "optimizer") if part is None else (part,):
            self._room.back(wanted)

    def save_state(self) -> SavedActor:
        """Return this rank's part of weights, moments and counters, in host memory that the next call overwrites."""
        return self._state.save()

    def load_state(self, read: ReadFragment, counts: Mapping[str, int]) -> None:
        """Load a saved actor of any layout; see `actor.state`."""
        self._state.load(read, counts)

    @torch.no_grad()
    def infer(self, batch: Batch, wanted: Wanted | None = None) -> Inference:
        """Return log-probs and entropies of the responses in this data-parallel rank's rows, on the batch's device.

        With `wanted` the same pass also captures the drafter's training data.
        """
        self.engine.eval()
        out = Inference(torch.zeros(batch.tokens.shape), torch.zeros(batch.tokens.shape))
        captured: list[CapturedRow] = []
        share = slice(self.topology.tp_rank, None, self.topology.tp)
        for rows, micro in self._micro_batches(batch):
            answer = self.engine(micro.tokens, micro.response_mask, layers=wanted.layers if wanted else ())
            logprobs, entropy, *states = answer
            out.logprobs[rows, : logprobs.shape[1]] = logprobs.cpu()
            out.entropy[rows, : logprobs.shape[1]] = entropy.cpu()
            if wanted:
                hidden, logsumexp, features = states
                captured += captured_rows(rows.cpu(), micro, features, hidden, logsumexp, share)
        device = batch.tokens.device
        return Inference(
            out.logprobs.to(device),
            out.entropy.to(device),
            self._with_vocabulary(batch, captured, wanted) if wanted else None,
        )

    def _with_vocabulary(self, batch: Batch, rows: list[CapturedRow], wanted: Wanted) -> Captured:
        """Return the captured rows with the rows of the vocabulary matrices that they need; every rank calls it."""
        inside = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < batch.lengths[:, None]
        ids, device = batch.tokens[inside].unique(), self.topology.device
        weights, group = self.engine.module.vocabulary_weights(), self.topology.tp_group
        with deepspeed.zero.GatheredParameters(list(weights), enabled=self.engine.zero_optimization_stage() == 3):
            embeddings = vocabulary_rows(weights[0].detach(), ids.to(device), group)
            output = vocabulary_rows(weights[1].detach(), wanted.draft_ids.to(device), group)
        return Captured(rows, ids.cpu(), to_host(embeddings), to_host(output))

    def update(self, batch: Batch, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> dict[str, float]:
        """Train on one step's rows of this data-parallel rank, in `objective.minibatches` optimizer updates.

        Args:
            batch: B rows, the same number on every data-parallel rank, divisible by objective.minibatches. The first
                rows make the first minibatch.
            old_logprobs: [B, S], from `infer` before the first update.
            advantages: [B], from `objective`.

        Returns the objective's metrics over all data-parallel ranks and the step's tokens, and policy/loss,
        policy/grad_norm and policy/lr, means over its updates. Raises NonFiniteStep at the first minibatch whose loss
        or gradient is not finite anywhere: it changes nothing and the later ones are not tried, but the ones before it
        stay applied.
        """
        self.engine.train()
        count = self.config.objective.minibatches
        if len(batch) % count:
            raise ValueError(f"{len(batch)} rows do not split into objective.minibatches={count}")
        results = []
        for number, rows in enumerate(torch.arange(len(batch)).chunk(count), 1):
            metrics = self._update_minibatch(batch.rows(rows), old_logprobs[rows], advantages[rows])
            if metrics is None:
                raise NonFiniteStep(
                    f"loss or gradient is not finite in minibatch {number} of {count}; it changed nothing"
                )
            results.append(metrics)
        return finish(merge(results), count)

    def _update_minibatch(self, batch: Batch, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> Metrics | None:
        """Do one optimizer update. Return its metrics over all data-parallel ranks, None if it was refused."""
        tokens, sequences = self._count(batch)
        lr = self.engine.get_lr()[0]
        parts: list[Metrics] = []
        micros = list(self._micro_batches(batch))
        for number, (rows, micro) in enumerate(micros, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(micros))
            weights = self.objective.token_weights(micro.response_mask, tokens, sequences)
            loss, metrics = self.objective.loss(self._inputs(micro, old_logprobs[rows], advantages[rows], weights))
            # The weights sum to 1 over all ranks and micro-batches, but DeepSpeed averages gradients over the ranks.
            self.engine.backward(loss * self.topology.dp)
            parts.append({**metrics, "policy/loss": PerUpdate.of(loss)})
        merged = merge(parts)
        loss = merged["policy/loss"].total
        if not step_if_finite(self.engine, loss.isfinite()):
            return None
        update = {"policy/grad_norm": float(self.engine.get_global_grad_norm()), "policy/lr": lr}
        alike = {name: PerUpdate(loss.new_tensor(value)) for name, value in update.items()}  # on every rank
        return {**self._over_copies(merged), **alike}

    def _inputs(
        self, micro: Batch, old_logprobs: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor
    ) -> LossInputs:
        """Run the forward pass of a micro-batch; return its results with the other inputs of the loss."""
        device, width = self.topology.device, micro.tokens.shape[1]
        logprobs, entropies = self.engine(micro.tokens, micro.response_mask)
        return LossInputs(
            logprobs=logprobs,
            entropies=entropies,
            old=old_logprobs[:, :width].to(device),
            sampler=micro.sampler_logprobs,
            advantages=advantages.to(device),
            mask=micro.response_mask,
            weights=weights,
            origins=micro.origins,
        )

    def _count(self, batch: Batch) -> tuple[float, float]:
        """Return the response tokens and non-empty responses of the minibatch over all data-parallel ranks."""
        lengths = batch.response_mask.sum(1)
        counts = torch.stack([lengths.sum(), (lengths > 0).sum()]).to(self.topology.device)
        dist.all_reduce(counts, group=self.topology.dp_group)
        tokens, sequences = counts.clamp(min=1).tolist()
        return tokens, sequences

    def _over_copies(self, metrics: Metrics) -> Metrics:
        """Combine metrics over all data-parallel ranks."""
        added, compared = pack(metrics)
        dist.all_reduce(added, group=self.topology.dp_group)
        if len(compared):  # an objective may have no extremes
            dist.all_reduce(compared, dist.ReduceOp.MAX, group=self.topology.dp_group)
        return unpack(metrics, added, compared)

    def _micro_batches(self, batch: Batch):
        for rows, micro in micro_batches(batch, self.config.actor.micro_batch_size, self.multiple_of):
            yield rows, micro.to(self.topology.device)

    @torch.no_grad()
    def generate_greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return the greedy continuation of each prompt and its log-probs at temperature 1. For checks: it is slow.

        Runs one full forward pass for each token, without a cache or a stop token. Every rank gives the same prompts.
        """
        rows, logprobs = [list(prompt) for prompt in prompts], []
        for _ in range(max_new_tokens):
            best = self.logits_after(rows).log_softmax(1).max(1)
            for row, token in zip(rows, best.indices.tolist(), strict=True):
                row.append(token)
            logprobs.append(best.values)
        new = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        return new, torch.stack(logprobs, 1).tolist() if logprobs else [[] for _ in prompts]

    @torch.no_grad()
    def logits_after(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return logits [R, V] in float32 for the token after each row. Every rank gives the same rows."""
        self.engine.eval()
        longest = max(map(len, rows))
        tokens = torch.zeros(len(rows), -(-longest // self.multiple_of) * self.multiple_of, dtype=torch.int64)
        last = torch.zeros_like(tokens, dtype=torch.bool)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
            last[index, len(row) - 1] = True
        return self.logits_at(tokens, last)

    @torch.no_grad()
    def logits_at(self, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return logits [N, V] in float32 after the N positions of `tokens` [B, S] where `wanted` [B, S] is true.

        S must be a multiple of the tensor-parallel size under sequence parallelism.
        """
        self.engine.eval()
        shard = self.engine(tokens.to(self.topology.device), wanted.to(self.topology.device), want="logits")
        shard = shard.float().contiguous()
        shards = [torch.empty_like(shard) for _ in range(self.topology.tp)]
        dist.all_gather(shards, shard, group=self.topology.tp_group)
        return torch.cat(shards, 1)[:, : self.hf_config.vocab_size]


def deepspeed_settings(config: Config) -> dict:
    """Return DeepSpeed's configuration. `Actor` counts micro-batches itself, so accumulation is 1 here."""
    bf16 = config.model.dtype == "bf16"
    return {
        "train_micro_batch_size_per_gpu": config.actor.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.actor.optim.clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,  # torch's AdamW is elementwise, so ZeRO may divide it anywhere
        "zero_optimization": {
            "stage": config.actor.zero.stage,
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,  # elements; a buffer of this size is allocated for every model size
            "stage3_param_persistence_threshold": 0,  # partition every parameter, so that all are treated alike
        },
        # A bf16 model's many small micro-batch gradients are added up in float32.
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16},
    }
