"""Weight updates of a running sglang engine: one session, one model, every reply checked.

sglang's own Engine methods leave out the selector, whose default writes the target's tensors into the drafter too. Here
the messages are built with it, always "target" or "draft".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import torch

from respec_trainer.errors import EngineError
from respec_trainer.rollout.engine import Role, TensorSpec
from respec_trainer.rollout.sglang_args import EngineSettings
from respec_trainer.rollout.sglang_process import SGLangProcess

# The drafter's vocabulary maps are read once, at the start, and its embedding is the target's own.
FIXED_IN_DRAFTER = ("d2t", "t2d", "embed_tokens.weight", "model.embed_tokens.weight")


class WeightUpdater:
    """Speaks for one engine process. `role` is the model of the open update, None between updates."""

    def __init__(self, process: SGLangProcess, settings: EngineSettings):
        self.process, self.settings = process, settings
        self.role: Role | None = None
        self._names = {"target": weight_names(settings.model_path)}
        if settings.speculative:
            self._names["draft"] = weight_names(settings.drafter_path)

    def join_group(self, name: str, address: str, port: int, world_size: int, rank_offset: int, backend: str) -> Future:
        return self._send(
            f"joining process group {name}",
            "init_weights_update_group",
            "InitWeightsUpdateGroupReqInput",
            master_address=address,
            master_port=port,
            rank_offset=rank_offset,
            world_size=world_size,
            group_name=name,
            backend=backend,
        )

    def leave_group(self, name: str) -> None:
        doing = f"leaving process group {name}"
        message = "DestroyWeightsUpdateGroupReqInput"
        self._wait(self._send(doing, "destroy_weights_update_group", message, group_name=name), doing)

    def begin(self, role: Role) -> None:
        if self.role is not None:
            raise EngineError(f"an update of the {self.role} weights is open already: end it first")
        if role not in self._names:
            raise EngineError(f"the engine has no {role} model to update: it was started without speculation")
        doing = f"beginning an update of the {role} weights"
        self._wait(self._send(doing, "begin_weight_update", "BeginWeightUpdateReqInput", selector=role), doing)
        self.role = role

    def receive_broadcast(self, specs: Sequence[TensorSpec], role: Role, group: str) -> Future:
        self._check([spec.name for spec in specs], role)
        return self._send(
            f"receiving {len(specs)} {role} tensors from group {group}",
            "update_weights_from_distributed",
            "UpdateWeightsFromDistributedReqInput",
            names=[spec.name for spec in specs],
            dtypes=[spec.dtype for spec in specs],
            shapes=[list(spec.shape) for spec in specs],
            group_name=group,
            flush_cache=False,
            selector=role,
        )

    def receive_tensors(self, tensors: Sequence[tuple[str, torch.Tensor]], role: Role) -> None:
        self._check([name for name, _ in tensors], role)
        if not tensors:
            return
        load_format = None if self.settings.device == "cpu" else "flattened_bucket"
        doing = f"loading {len(tensors)} {role} tensors"
        sent = self._send(
            doing,
            "update_weights_from_tensor",
            "UpdateWeightsFromTensorReqInput",
            serialized_named_tensors=_serialize(list(tensors), self.settings.engine.tp, load_format),
            load_format=load_format,
            flush_cache=False,
            selector=role,
        )
        self._wait(sent, doing)

    def end(self, role: Role) -> None:
        self._check([], role)
        doing = f"ending the update of the {role} weights"
        self._wait(self._send(doing, "end_weight_update", "EndWeightUpdateReqInput"), doing)
        self.role = None
        flushed = self._wait(self.process.call(self.process.manager.flush_cache), "flushing the KV cache")
        if not flushed.success:
            raise EngineError(f"flushing the KV cache: {flushed.message}")

    def _check(self, names: Sequence[str], role: Role) -> None:
        """Refuse what sglang would take without a word, or drop without one."""
        if self.role is None:
            raise EngineError(f"{role} weights outside of an update: call begin_weight_update({role!r}) first")
        if role != self.role:
            raise EngineError(f"{role} weights during an update of the {self.role} weights")
        fixed = [name for name in names if role == "draft" and name in FIXED_IN_DRAFTER]
        if fixed:
            raise EngineError(f"the drafter's {', '.join(fixed)} cannot be updated while the engine runs: leave it out")
        known = self._names[role]
        unknown = sorted(set(names) - known) if known else []
        if unknown:
            raise EngineError(
                f"the {role} model has no {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''} "
                f"({len(unknown)} unknown of {len(names)} names); it would be dropped in silence"
            )

    def _send(self, doing: str, method: str, message: str, **fields: Any) -> Future:
        """Send one message; the future gives None, or raises EngineError with the engine's own words."""
        from sglang.srt.managers import io_struct

        request = getattr(io_struct, message)(**fields)
        return self.process.call(_checked, doing, getattr(self.process.manager, method), request)

    def _wait(self, sent: Future, doing: str) -> Any:
        limit = self.settings.engine.timeout
        try:
            return sent.result(limit)
        except FutureTimeoutError:
            self.process.fail(f"{doing}: no answer for {limit:.0f} s (rollout.engine.timeout)")
            raise self.process.failure from None


def weight_names(folder: str) -> set[str]:
    """Names of the tensors in a folder's safetensors files, from their headers; empty if there are none."""
    names: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            names |= json.loads(file.read(length)).keys() - {"__metadata__"}
    return names


def _serialize(tensors: list[tuple[str, torch.Tensor]], tp: int, load_format: str | None) -> list:
    """One payload a rank of the engine, so that each rank's references to shared memory end with its own load."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    payloads = []
    for _ in range(tp):
        content: Any = [(name, tensor.detach()) for name, tensor in tensors]
        if load_format == "flattened_bucket":
            bucket = FlattenedTensorBucket(named_tensors=content)  # copies into a fresh buffer of its own
            content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
        payloads.append(MultiprocessingSerializer.serialize(content))
    return payloads


async def _checked(doing: str, method, request) -> None:
    success, message = (await method(request, None))[:2]
    if not success:
        raise EngineError(f"{doing}: {message}")
