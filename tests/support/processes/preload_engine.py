"""What an engine's process imports before the plugin's hooks go in, in the order of `sglang_workers`: for `forking`."""

from __future__ import annotations

import warnings

from tests.support.processes.preload import become_template  # isort: skip

from respec_trainer.rollout.sglang.workers import prepare_process

warnings.filterwarnings("ignore")
prepare_process("cpu")

import sglang.srt.managers.detokenizer_manager  # noqa: E402
import sglang.srt.managers.scheduler  # noqa: E402
import sglang.srt.model_loader.weight_utils  # noqa: E402, F401

become_template()
