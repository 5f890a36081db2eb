"""What sglang needs on a machine without a GPU: `sgl_kernel`, a stand-in for its CUDA kernel package, in pure torch.

sglang imports `sgl_kernel` as a top-level module, so the folder `stand_in` goes on the path of the engine's processes,
and only there.
"""

from __future__ import annotations

import sys
from pathlib import Path


def put_stand_in_on_path() -> None:
    """Let `import sgl_kernel` find the stand-in in this process and in those it spawns. Idempotent."""
    folder = str(Path(__file__).parent / "stand_in")
    if folder not in sys.path:
        sys.path.insert(0, folder)
