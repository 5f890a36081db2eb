"""Weight updates of a running sglang engine: one session, one model, every reply checked.

sglang's own Engine methods omit the selector, whose default writes the target's tensors into the drafter too. Here all
messages have a selector, "target" or "draft".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from respec_trainer.drafter.vocabulary import FIXED
from respec_trainer.errors import EngineError
from respec_trainer.models.registry import family_named
from respec_trainer.rollout.engine import Role, TensorSpec
from respec_trainer.rollout.sglang.process import SGLangProcess
from respec_trainer.rollout.sglang.settings import EngineSettings
from respec_trainer.speculation.algorithms import algorithm_of
from respec_trainer.weights.safetensors_io import MappedFile

# sglang reads the drafter's vocabulary maps once, at the start, and uses the target's embedding, under either name.
FIXED_IN_DRAFTER = (*FIXED, "model.embed_tokens.weight")


class WeightUpdater:
    """Weight updates of one engine process. `role` is the model of the open update, None between updates."""

    def __init__(self, process: SGLangProcess, settings: EngineSettings):
        self.process, self.settings = process, settings
        self.role: Role | None = None
        self._missing: set[str] = set()  # of the open update
        self._groups: set[str] = set()
        self._shapes = {"target": weight_shapes(settings.model_path)}
        if (head := _tied_head(settings.model_path)) is not None:
            self._shapes["target"].pop(head, None)  # some folders contain a copy of it
        if algorithm_of(settings.speculation).pushes:
            self._shapes["draft"] = weight_shapes(settings.drafter_path)

    def join_group(self, name: str, address: str, port: int, world_size: int, rank_offset: int, backend: str) -> Future:
        self._groups.add(name)
        return self.send(
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
        if name not in self._groups:
            return
        self._groups.discard(name)
        doing = f"leaving process group {name}"
        message = "DestroyWeightsUpdateGroupReqInput"
        self.process.wait(self.send(doing, "destroy_weights_update_group", message, group_name=name), doing)

    def shapes(self, role: Role) -> dict[str, tuple[int, ...]]:
        """Return the shapes that an update must contain, without tied heads and a drafter's fixed tensors."""
        known = self._shapes.get(role, {})
        return {name: shape for name, shape in known.items() if role == "target" or name not in FIXED_IN_DRAFTER}

    def begin(self, role: Role, names: Collection[str] = ()) -> None:
        if self.role is not None:
            raise EngineError(f"an update of the {self.role} weights is open already: end it first")
        if role not in self._shapes:
            raise EngineError(f"the engine has no {role} model to update: it was started without speculation")
        doing = f"beginning an update of the {role} weights"
        self.process.wait(self.send(doing, "begin_weight_update", "BeginWeightUpdateReqInput", selector=role), doing)
        self.role, self._missing = role, set(names)

    def receive_broadcast(self, specs: Sequence[TensorSpec], role: Role, group: str) -> Future:
        self._check({spec.name: spec.shape for spec in specs}, role)
        self._missing -= {spec.name for spec in specs}
        return self.send(
            f"receiving {len(specs)} {role} tensors from group {group}",
            "update_weights_from_distributed",
            "UpdateWeightsFromDistributedReqInput",
            names=[spec.name for spec in specs],
            dtypes=[spec.dtype for spec in specs],
            shapes=[list(spec.shape) for spec in specs],
            group_name=group,
            flush_cache=True,  # cached prefixes are of the earlier weights (cheap: no memory is freed)
            selector=role,
        )

    def receive_tensors(self, tensors: Sequence[tuple[str, torch.Tensor]], role: Role) -> Future:
        self._check({name: tuple(tensor.shape) for name, tensor in tensors}, role)
        self._missing -= {name for name, _ in tensors}
        content = flat_bucket(tensors)
        sent = self.send(
            f"loading {len(tensors)} {role} tensors",
            "update_weights_from_tensor",
            "UpdateWeightsFromTensorReqInput",
            serialized_named_tensors=serialize(content, self.settings.engine.tp),
            load_format="flattened_bucket",
            flush_cache=True,
            selector=role,
        )
        sent.add_done_callback(lambda _, kept=content: None)  # the engine reads this process's memory until then
        return sent

    def end(self, role: Role) -> None:
        self._check({}, role)
        if self._missing:
            some = ", ".join(sorted(self._missing)[:5])
            raise EngineError(f"{len(self._missing)} {role} tensors never arrived: {some}; the update is not complete")
        self._close(f"ending the update of the {role} weights")

    def abort(self) -> None:
        if self.role is not None:
            self._close(f"closing the broken update of the {self.role} weights")

    def _close(self, doing: str) -> None:
        self.process.wait(self.send(doing, "end_weight_update", "EndWeightUpdateReqInput"), doing)
        self.role, self._missing = None, set()

    def digests(self, role: Role) -> dict[str, str]:
        """Return digests of the weights, which `inside/digest.py` makes, by the names of sglang's modules."""
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        request = CheckWeightsReqInput(action="checksum", selector=role)
        sent = self.process.call(self.process.manager.check_weights, request)
        success, message, ranks, _ = self.process.wait(sent, f"digesting the {role} weights")
        if not success:
            raise EngineError(f"digesting the {role} weights: {message}")
        return {key.removeprefix(f"{role}."): value for key, value in ranks[0]["checksums"].items()}

    def _check(self, shapes: dict[str, tuple[int, ...]], role: Role) -> None:
        """Refuse tensors that sglang would drop silently, or that would crash it."""
        if self.role is None:
            raise EngineError(f"{role} weights outside of an update: call begin_weight_update({role!r}) first")
        if role != self.role:
            raise EngineError(f"{role} weights during an update of the {self.role} weights")
        fixed = [name for name in shapes if role == "draft" and name in FIXED_IN_DRAFTER]
        if fixed:
            raise EngineError(
                f"the drafter's {', '.join(fixed)} cannot be updated while the engine runs: leave it out of the update"
            )
        known = self._shapes[role]
        for name, shape in shapes.items() if known else ():
            if name not in known:
                raise EngineError(f"the {role} model has no {name}; sglang would drop it silently")
            if tuple(shape) != known[name]:
                raise EngineError(f"{role} weight {name} has shape {tuple(shape)}, but the model's is {known[name]}")

    def send(self, doing: str, method: str, message: str, **fields: Any) -> Future:
        """Send one message. The future's result is None, or EngineError with the engine's own message."""
        from sglang.srt.managers import io_struct

        request = getattr(io_struct, message)(**fields)
        return self.process.call(_checked, doing, getattr(self.process.manager, method), request)


def _tied_head(folder: str) -> str | None:
    """Return the name of the output layer's weight if the folder's config.json ties it to the embedding, else None."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return family_named(config.get("model_type")).names.head_weight if config.get("tie_word_embeddings") else None


def weight_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a folder's safetensors files, from their headers; empty if there are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in Path(folder).glob("*.safetensors"):
        file = MappedFile(path)
        shapes |= {name: file.shape(name) for name in file.names()}
    return shapes


def flat_bucket(tensors: Sequence[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """Return tensors in sglang's load format "flattened_bucket": one buffer of bytes, and each tensor's offsets in it.

    Tensors that are adjacent in memory are not copied; others are copied into one buffer.
    """
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket, FlattenedTensorMetadata

    tensors = [(name, tensor.detach()) for name, tensor in tensors]
    flat = _common_memory([tensor for _, tensor in tensors])
    if flat is None:
        bucket = FlattenedTensorBucket(named_tensors=tensors)
        return {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    metadata, start = [], 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, start + size, size))
        start += size
    return {"flattened_tensor": flat, "metadata": metadata}


def _common_memory(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the bytes of `tensors` if they are adjacent in one piece of memory, else None."""
    expected = tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != expected or not tensor.is_contiguous():
            return None
        expected += tensor.numel() * tensor.element_size()
    storage = tensors[0].untyped_storage()
    first = tensors[0].data_ptr() - storage.data_ptr()
    size = expected - tensors[0].data_ptr()
    if first + size > storage.nbytes():
        return None  # adjacent by chance, in different pieces of memory
    return torch.empty(0, dtype=torch.uint8, device=tensors[0].device).set_(storage, first, (size,))


def serialize(content: dict[str, Any], tp: int) -> list[bytes]:
    """Return one payload of memory handles for each rank of the engine; each rank releases its own after loading."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    if content["flattened_tensor"].is_cuda:
        monkey_patch_torch_reductions()  # identifies devices by UUID: the engine may number them differently
    return [MultiprocessingSerializer.serialize(content) for _ in range(tp)]


async def _checked(doing: str, method, request) -> None:
    success, message = (await method(request, None))[:2]
    if not success:
        raise EngineError(f"{doing}: {message}")
