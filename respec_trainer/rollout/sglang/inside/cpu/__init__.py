"""What sglang's processes need without a GPU, among them `sgl_kernel`, a stand-in in torch for its CUDA kernel package.

sglang imports `sgl_kernel` as a top-level module, so the folder `stand_in` is put on the path of the engine's processes
only.
"""

from __future__ import annotations

import sys
from pathlib import Path


def put_stand_in_on_path() -> None:
    """Make `import sgl_kernel` find the stand-in in this process and in those it spawns. Idempotent."""
    folder = str(Path(__file__).parent / "stand_in")
    if folder not in sys.path:
        sys.path.insert(0, folder)
