"""The imports of a rank before its first call, as in launch/train.py, and to start an engine; see `forking`."""

from __future__ import annotations

import warnings

from respec_trainer.compat import prepare
from tests.support.processes.preload import become_template

warnings.filterwarnings("ignore")
prepare("cpu")

import respec_trainer.job  # noqa: E402
import respec_trainer.trainer  # noqa: E402, F401
from respec_trainer.rollout.sglang.workers import prepare_process  # noqa: E402

prepare_process("cpu")

import sglang.srt.entrypoints.engine  # noqa: E402, F401

become_template()
