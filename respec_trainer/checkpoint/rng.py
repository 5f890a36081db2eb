"""The states of this process's random number generators: Python, NumPy, PyTorch on the CPU and on the GPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomStates:
    """The random states as a part of a run that can be saved and loaded."""

    def state_dict(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the legacy generator is what libraries draw from
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": cuda,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states; the GPU's only if the run was saved with a GPU and has one now."""
        kind, keys, *rest = state["numpy"]
        random.setstate(state["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
