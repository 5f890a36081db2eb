"""Saves and loads the actor's state in DeepSpeed: each rank handles its own part of the optimizer, without gathers.

DeepSpeed's own checkpoints are pickles that fit only one layout. Here a rank saves the ranges of parameters it owns in
the float32 tensors of AdamW; ZeRO 1, 2 and 3 divide them in different ways. The weights in the model's dtype are not
saved, because they are the rounded float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from respec_trainer.actor.offload import PIECE, Away, Offload
from respec_trainer.actor.parallel import Topology
from respec_trainer.checkpoint.fragments import KINDS, SavedActor, fragment_key
from respec_trainer.compat.versions import require_version
from respec_trainer.dtypes import dtype_name

# read(kind, name, shape, start, length) returns entries start .. start + length of this rank's flattened shard `name`.
ReadFragment = Callable[[str, str, tuple[int, ...], int, int], torch.Tensor]


@dataclass(frozen=True)
class Owned:
    """A range that this rank owns: entries start .. start + length of `name` are those from `offset` on in `flat`."""

    name: str
    shape: tuple[int, ...]  # of the tensor-parallel shard; `start` is an index into it when flattened
    start: int
    length: int
    flat: torch.Tensor  # a float32 tensor that AdamW updates
    offset: int


class ActorState:
    """Saves and loads the weights, moments and counters of a DeepSpeed engine of ZeRO 1, 2 or 3 with torch's AdamW."""

    def __init__(self, engine, topology: Topology, offload: Offload):
        require_version("deepspeed", "0.19.8", "saving the actor, which depends on how ZeRO lays out its partitions")
        self.engine, self.topology, self.offload = engine, topology, offload
        self._host: dict[str, torch.Tensor] = {}

    def save(self) -> SavedActor:
        """Return copies of this rank's part, in host memory that the next call overwrites. Not collective.

        Call it between updates. The actor may be on its device or offloaded.
        """
        away, fragments = self.offload.pieces_away(), {}
        for owned in owned_parts(self.engine, self.topology.dp_rank):
            for kind in KINDS:
                key = fragment_key(kind, owned.name, owned.start)
                fragments[key] = self._copy(key, self._tensor(owned.flat, kind), owned, away)
        get_accelerator().synchronize()
        self._host = fragments
        ranks = self.topology.tp_rank, self.topology.dp_rank
        return SavedActor(*ranks, self._layout(), fragments, self._counts(away))

    @torch.no_grad()
    def load(self, read: ReadFragment, counts: Mapping[str, int]) -> None:
        """Load a saved actor. All ranks call it, with the whole actor on its device."""
        if self.offload.pieces_away():
            raise RuntimeError(
                "the actor's state is loaded while parts of it are off its device: bring them back first"
            )
        for flat in flat_tensors(self.engine):
            self._make_states(flat)
        for owned in owned_parts(self.engine, self.topology.dp_rank):
            for kind in KINDS:
                target = self._tensor(owned.flat, kind).narrow(0, owned.offset, owned.length)
                target.copy_(read(kind, owned.name, owned.shape, owned.start, owned.length))
        self._set_counts(counts)
        round_weights(self.engine)

    def _tensor(self, flat: torch.Tensor, kind: str) -> torch.Tensor | None:
        """Return the tensor of that kind; None for moments before the first update, which are zero."""
        return flat if kind == "master" else self._adam.state.get(flat, {}).get(kind)

    def _copy(self, key: str, source: torch.Tensor | None, owned: Owned, away: Away) -> torch.Tensor:
        kept = self._host.get(key)  # new memory would cost more time than the copy
        out = torch.empty(owned.length) if kept is None else kept
        return out.zero_() if source is None else copy_from(source, owned.offset, away, out)

    def _make_states(self, flat: torch.Tensor) -> None:
        """Make the states that AdamW's first step would make, if there was no step yet."""
        state = self._adam.state[flat]
        if not state:
            # A fused AdamW keeps its step count on the parameter's device.
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)

    @property
    def _adam(self) -> torch.optim.AdamW:
        return self.engine.optimizer.optimizer

    def _layout(self) -> dict[str, Any]:
        stage = self.engine.zero_optimization_stage()
        parameters = list(self.engine.module.named_parameters())
        dtype = dtype_name(parameters[0][1].dtype)
        layout = {"tp": self.topology.tp, "dp": self.topology.dp, "zero": stage, "dtype": dtype, "optimizer": True}
        return layout | {"parameters": {name: list(shape_of(p)) for name, p in parameters}}

    def _counts(self, away: Away) -> dict[str, int]:
        engine, steps = self.engine, [state["step"].view(1) for state in self._adam.state.values() if state]
        return {
            "adam_steps": int(copy_from(steps[0], 0, away, torch.empty(1))) if steps else 0,
            "schedule": engine.lr_scheduler.last_epoch,
            "global_steps": engine.global_steps,
            "skipped_steps": engine.skipped_steps,
            "global_samples": engine.global_samples,
            "micro_steps": engine.micro_steps,
        }

    def _set_counts(self, counts: Mapping[str, int]) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(counts["adam_steps"])
        for name in ("global_steps", "skipped_steps", "global_samples", "micro_steps"):
            setattr(self.engine, name, counts[name])
        schedule = self.engine.lr_scheduler
        schedule.last_epoch = counts["schedule"]
        # The rates follow this run's schedule, which may have more steps than the saved run's.
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, rate in zip(self._adam.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates


def flat_tensors(engine) -> list[torch.Tensor]:
    """Return the float32 tensors of this rank that AdamW updates; some may be only padding."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(zero.fp32_partitioned_groups_flat)
    return [flat for group in zero.optimizer.param_groups for flat in group["params"]]


def owned_parts(engine, dp_rank: int) -> Iterator[Owned]:
    """Yield the ranges of parameters that this rank owns, in the model's order, without padding."""
    zero, zero3 = engine.optimizer, engine.zero_optimization_stage() == 3
    for name, parameter in engine.module.named_parameters():
        part = _owned_zero3(zero, name, parameter, dp_rank) if zero3 else _owned(zero, name, parameter)
        if part is not None:
            yield part


def _owned(zero, name: str, parameter: torch.nn.Parameter) -> Owned | None:
    """Return the owned range under ZeRO 1 and 2, where each rank owns a range of each parameter group; None if none."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    (flat,) = zero.optimizer.param_groups[mapping.param_group_index]["params"]
    in_shard, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Owned(name, shape_of(parameter), in_shard.start, in_shard.numel, flat, in_flat.start)


def _owned_zero3(zero, name: str, parameter: torch.nn.Parameter, dp_rank: int) -> Owned | None:
    """Return the owned range under ZeRO 3, where each rank owns an equal range of every parameter; None if padding."""
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    length = min(size, parameter.ds_numel - dp_rank * size)
    flat = zero.fp32_partitioned_groups_flat[group]
    return Owned(name, shape_of(parameter), dp_rank * size, length, flat, offset) if length > 0 else None


def shape_of(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the tensor-parallel shard, also if ZeRO 3 has partitioned it."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def round_weights(engine) -> None:
    """Set the model's weights on all ranks to the optimizer's float32 weights, rounded to the model's dtype."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    engine.empty_partition_cache()  # otherwise weights that were gathered before would be used again
    for parameter in engine.module.parameters():
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        parameter.ds_tensor.data.copy_(zero.fp32_partitioned_groups_flat[group].narrow(0, offset, size))


def copy_from(source: torch.Tensor, offset: int, away: Away, out: torch.Tensor) -> torch.Tensor:
    """Fill `out` [N] with entries `offset` .. offset + N of `source`, from the device or from host memory."""
    pieces = away.get(source.untyped_storage()._cdata)
    if pieces is None:
        return out.copy_(source.detach().narrow(0, offset, len(out)))
    first, target = (source.storage_offset() + offset) * source.element_size(), out.view(torch.uint8)
    done = 0
    while done < len(target):
        piece, inside = divmod(first + done, PIECE)
        part = pieces[piece][inside : inside + len(target) - done]
        target[done : done + len(part)] = part
        done += len(part)
    return out
