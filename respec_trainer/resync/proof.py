"""Proof that an engine holds what was sent: digests of every tensor, made here of what was streamed, there of what lies
in the engine's memory, and compared name by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from respec_trainer.errors import ProofError, ResyncError
from respec_trainer.rollout.engine import Role

# Weights of the engine's drafter that are never sent: the target's own, shared.
SHARED_WITH_TARGET = ("embed_tokens.weight", "lm_head.weight")
NAMED = 5  # differences that an error spells out


@dataclass
class Held:
    """What the engines must hold of one model."""

    version: str
    digests: dict[str, str] = field(default_factory=dict)  # of every tensor, by the name it was sent with; or empty


def check(role: Role, sent: Held, held: Mapping[str, str], pushed: bool = True) -> None:
    """Compare an engine's digests with those of what was sent.

    Args:
        pushed: whether this model was part of the push that is being proved; else it was sent by an earlier one.

    Raises ProofError naming the role, its version and the tensors that differ or are missing.
    """
    held = {as_sent(name, role): value for name, value in held.items()}
    wrong = [f"{name} differs" for name in sent.digests if name in held and sent.digests[name] != held[name]]
    wrong += [f"{name} is not in the engine" for name in sent.digests if name not in held]
    shared = SHARED_WITH_TARGET if role == "draft" else ()
    wrong += [f"{name} was not sent" for name in held if name not in sent.digests and name not in shared]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        why = ""
        if not pushed:
            why = "; they were right before and were not part of this push, so something else wrote them: tensors of "
            why += f"the other model, or the engine's sleep (after which {sent.version} must be pushed again)"
        raise ProofError(f"the engine's {role} weights are not {sent.version}: {', '.join(wrong[:NAMED])}{more}{why}")


def check_architecture(role: Role, ours: Mapping[str, tuple], engines: Mapping[str, tuple], versions: str) -> None:
    """Compare names and shapes before anything is sent. Raises ResyncError naming the first tensor that is not alike.

    `versions` says whose they are, on both sides.
    """
    for name in [*ours, *(name for name in engines if name not in ours)]:
        here, there = ours.get(name), engines.get(name)
        if here != there:
            raise ResyncError(
                f"the engine's {role} model is another one: {name} is {_shape(there)} in the engine and {_shape(here)} "
                f"in the trainer ({versions}); start both from the same folder"
            )


def as_sent(name: str, role: Role) -> str:
    """The name that a weight of the engine is sent with: drafters are stored without sglang's outer modules."""
    if role == "target":
        return name
    return name.removeprefix("model.").replace("layers.0.", "midlayer.", 1)


def _shape(shape: tuple | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
