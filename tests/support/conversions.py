"""tools/convert_checkpoint.py in processes that start in milliseconds, for tests that kill it.

Each is forked from a process that has imported this module, with all that a conversion needs, and done nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from respec_trainer.actor import check, loading  # noqa: F401 - imported for the forked processes, as are the next two
from respec_trainer.checkpoint import progress  # noqa: F401
from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.convert import convert  # noqa: F401
from respec_trainer.drafter import format  # noqa: A004, F401

define_torchvision_operators()
from transformers import AutoConfig  # noqa: E402

AutoConfig.for_model("qwen3")
TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"


def start(words: list[str], out: Path) -> BaseProcess:
    """Start `python tools/convert_checkpoint.py WORDS`. Return when its folder beside `out` exists, or it has ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run_tool, args=(words,))
    process.start()
    while process.is_alive() and not partials(out):
        time.sleep(2e-4)
    return process


def partials(out: Path) -> list[Path]:
    """Return the unfinished folders of conversions to `out`."""
    return list(out.parent.glob(f".{out.name}.partial-*"))


def _run_tool(words: list[str]) -> None:
    sys.argv = [str(TOOL), *words]
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - hides its progress bars
    runpy.run_path(str(TOOL), run_name="__main__")
