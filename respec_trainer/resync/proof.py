"""Proof that an engine holds what was sent: digests of the streamed tensors are compared, name by name, with digests of
the tensors in the engine's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from respec_trainer.errors import ProofError, ResyncError
from respec_trainer.rollout.engine import Role

# Weights of the engine's drafter that are never sent, because it shares them with the target.
SHARED_WITH_TARGET = ("embed_tokens.weight", "lm_head.weight")
NAMED = 5  # most differences that an error lists


@dataclass
class Held:
    """The weights of one model that the engines must hold."""

    version: str
    digests: dict[str, str] = field(default_factory=dict)  # by the name a tensor was sent with; empty: unknown


def check(role: Role, sent: Held, held: Mapping[str, str], pushed: bool = True) -> None:
    """Compare an engine's digests with those of the tensors that were sent.

    Args:
        pushed: whether this model was part of the push that is verified; if not, an earlier push sent it.

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
            why = "; they were right before and were not part of this push, so something else changed them: tensors of "
            why += f"the other model, or the engine's sleep (after which {sent.version} must be pushed again)"
        raise ProofError(f"the engine's {role} weights are not {sent.version}: {', '.join(wrong[:NAMED])}{more}{why}")


def check_architecture(role: Role, ours: Mapping[str, tuple], engines: Mapping[str, tuple], versions: str) -> None:
    """Compare names and shapes before anything is sent. Raises ResyncError naming the first tensor that differs.

    `versions` names the versions of both sides, for the message.
    """
    for name in [*ours, *(name for name in engines if name not in ours)]:
        ours_shape, theirs = ours.get(name), engines.get(name)
        if ours_shape != theirs:
            raise ResyncError(
                f"the engine's {role} model is another one: {name} is {_shape(theirs)} in the engine and "
                f"{_shape(ours_shape)} in the trainer ({versions}); start both from the same folder"
            )


def as_sent(name: str, role: Role) -> str:
    """Return the name with which the engine's weight `name` is sent: a drafter's names lack sglang's outer modules."""
    if role == "target":
        return name
    return name.removeprefix("model.").replace("layers.0.", "midlayer.", 1)


def _shape(shape: tuple | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
