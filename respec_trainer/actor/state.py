"""The actor's state out of DeepSpeed and into it: each rank its own part of the optimizer, nothing gathered.

DeepSpeed's own checkpoints are pickles bound to one layout. Here a rank saves what it owns: stretches of parameters in
the float32 tensors that AdamW works on, which ZeRO 1, 2 and 3 cut in ways of their own. The weights in the model's
dtype are not saved: they are the float32 ones, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from respec_trainer.actor.offload import PIECE, Offload
from respec_trainer.actor.parallel import Topology
from respec_trainer.checkpoint.fragments import KINDS, SavedActor, fragment_key
from respec_trainer.compat.versions import require_version

# read(kind, name, shape, start, length) gives entries start .. start + length of this rank's flattened shard `name`.
ReadFragment = Callable[[str, str, tuple[int, ...], int, int], torch.Tensor]
Away = Mapping[int, list[torch.Tensor]]  # by the address of an emptied storage's record: its bytes


@dataclass(frozen=True)
class Owned:
    """Entries start .. start + length of parameter `name` are those from `offset` on of `flat`, which AdamW steps."""

    name: str
    shape: tuple[int, ...]  # of the tensor-parallel shard, which `start` counts in once it is flattened
    start: int
    length: int
    flat: torch.Tensor
    offset: int


class ActorState:
    """Saves and loads the weights, moments and counters of a DeepSpeed engine of ZeRO 1, 2 or 3 with torch's AdamW."""

    def __init__(self, engine, topology: Topology, offload: Offload):
        require_version("deepspeed", "0.19.8", "saving the actor, which knows how ZeRO lays out its partitions")
        self.engine, self.topology, self.offload = engine, topology, offload
        self._host: dict[str, torch.Tensor] = {}

    def save(self) -> SavedActor:
        """Copies of this rank's part, in host memory that the next call uses again. Not collective.

        The actor may be on its device or not, but between updates.
        """
        away, fragments = pieces_away(self.offload), {}
        for owned in owned_parts(self.engine, self.topology.dp_rank):
            for kind in KINDS:
                key = fragment_key(kind, owned.name, owned.start)
                fragments[key] = self._copy(key, self._tensor(owned.flat, kind), owned, away)
        get_accelerator().synchronize()
        self._host = fragments
        place = self.topology.tp_rank, self.topology.dp_rank
        return SavedActor(*place, self._layout(), fragments, self._counts(away))

    @torch.no_grad()
    def load(self, read: ReadFragment, counts: Mapping[str, int]) -> None:
        """Take the place of a saved actor. All ranks call it, with the whole actor on its device."""
        if pieces_away(self.offload):
            raise RuntimeError(
                "the actor's state is loaded while parts of it are off its device: bring them back first"
            )
        for flat in flat_tensors(self.engine):
            self._make_states(flat)
        for owned in owned_parts(self.engine, self.topology.dp_rank):
            for kind in KINDS:
                there = self._tensor(owned.flat, kind).narrow(0, owned.offset, owned.length)
                there.copy_(read(kind, owned.name, owned.shape, owned.start, owned.length))
        self._set_counts(counts)
        round_weights(self.engine)

    def _tensor(self, flat: torch.Tensor, kind: str) -> torch.Tensor | None:
        """None for moments before the first update: they are zero."""
        return flat if kind == "master" else self._adam.state.get(flat, {}).get(kind)

    def _copy(self, key: str, source: torch.Tensor | None, owned: Owned, away: Away) -> torch.Tensor:
        kept = self._host.get(key)  # fresh memory would cost more than the copying
        out = torch.empty(owned.length) if kept is None else kept
        return out.zero_() if source is None else copy_from(source, owned.offset, away, out)

    def _make_states(self, flat: torch.Tensor) -> None:
        """What AdamW's first step would make, if there was none yet."""
        state = self._adam.state[flat]
        if not state:
            # A fused AdamW keeps its count on the parameter's device.
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)

    @property
    def _adam(self) -> torch.optim.AdamW:
        return self.engine.optimizer.optimizer

    def _layout(self) -> dict[str, Any]:
        stage = self.engine.zero_optimization_stage()
        parameters = list(self.engine.module.named_parameters())
        dtype = "bf16" if parameters[0][1].dtype == torch.bfloat16 else "fp32"
        place = {"tp": self.topology.tp, "dp": self.topology.dp, "zero": stage, "dtype": dtype, "optimizer": True}
        return place | {"parameters": {name: list(shape_of(p)) for name, p in parameters}}

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
        # By this run's schedule, which may be of more steps than the saved one.
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, rate in zip(self._adam.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates


def flat_tensors(engine) -> list[torch.Tensor]:
    """The float32 tensors of this rank that AdamW steps; of some, all may be padding."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(zero.fp32_partitioned_groups_flat)
    return [flat for group in zero.optimizer.param_groups for flat in group["params"]]


def owned_parts(engine, dp_rank: int) -> Iterator[Owned]:
    """This rank's stretches of every parameter, in the model's order; padding is left out."""
    zero, zero3 = engine.optimizer, engine.zero_optimization_stage() == 3
    for name, parameter in engine.module.named_parameters():
        part = _owned_zero3(zero, name, parameter, dp_rank) if zero3 else _owned(zero, name, parameter)
        if part is not None:
            yield part


def _owned(zero, name: str, parameter: torch.nn.Parameter) -> Owned | None:
    """Of ZeRO 1 and 2: each rank owns a stretch of each group of parameters, and so one of some parameters."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    (flat,) = zero.optimizer.param_groups[mapping.param_group_index]["params"]
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Owned(name, shape_of(parameter), here.start, here.numel, flat, there.start)


def _owned_zero3(zero, name: str, parameter: torch.nn.Parameter, dp_rank: int) -> Owned | None:
    """Of ZeRO 3: each rank owns an equal stretch of every parameter; the last ones may be padding in part."""
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    length = min(size, parameter.ds_numel - dp_rank * size)
    flat = zero.fp32_partitioned_groups_flat[group]
    return Owned(name, shape_of(parameter), dp_rank * size, length, flat, offset) if length > 0 else None


def shape_of(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Of the tensor-parallel shard, whether ZeRO 3 has partitioned it or not."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def round_weights(engine) -> None:
    """Make the model's weights on all ranks the float32 ones of the optimizer, rounded to the model's dtype."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    engine.empty_partition_cache()  # weights that were gathered before would be used once more
    for parameter in engine.module.parameters():
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        parameter.ds_tensor.data.copy_(zero.fp32_partitioned_groups_flat[group].narrow(0, offset, size))


def pieces_away(offload: Offload) -> Away:
    """What is off the device now: the host memory of each emptied storage, in pieces of PIECE bytes."""
    moved = [pair for pairs in offload.away.values() for pair in pairs]
    return {content.untyped_storage()._cdata: pieces for content, pieces in moved}


def copy_from(source: torch.Tensor, offset: int, away: Away, out: torch.Tensor) -> torch.Tensor:
    """Fill `out` [N] with entries `offset` .. offset + N of `source`, wherever they are."""
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
