"""Proof that an engine holds what was sent: digests of every tensor, made here of what was streamed, there of what lies
in the engine's memory, and compared name by name."""

from __future__ import annotations

from collections.abc import Mapping

from respec_trainer.errors import ResyncError
from respec_trainer.rollout.engine import Role

# Weights of the engine's drafter that are never sent: the target's own, shared.
SHARED_WITH_TARGET = ("embed_tokens.weight", "lm_head.weight")


def check(role: Role, sent: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Compare two sets of digests. Raises ResyncError naming the role and the tensors that differ, or are missing."""
    held = {as_sent(name, role): value for name, value in held.items()}
    wrong = [f"{name} differs" for name in sent if name in held and sent[name] != held[name]]
    wrong += [f"{name} is not in the engine" for name in sent if name not in held]
    shared = SHARED_WITH_TARGET if role == "draft" else ()
    wrong += [f"{name} was not sent" for name in held if name not in sent and name not in shared]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ResyncError(
            f"the engine's {role} weights are not what was sent: {', '.join(wrong[:5])}{more}; do not trust its samples"
        )


def as_sent(name: str, role: Role) -> str:
    """The name that a weight of the engine is sent with: drafters are stored without sglang's outer modules."""
    if role == "target":
        return name
    return name.removeprefix("model.").replace("layers.0.", "midlayer.", 1)
