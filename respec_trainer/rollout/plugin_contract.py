"""Contract between the trainer and the engine's plugin: the plugin's settings, and the origins of response tokens.

The plugin (`sglang/inside/plugin.py`) runs in sglang's scheduler. The process that starts the engine imports only this
module, not the plugin.
"""

from __future__ import annotations

import json
from typing import Any

from respec_trainer.errors import EngineError
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.sample import UNDRAFTED

SETTINGS = "RESPEC_ENGINE_PLUGIN"  # environment variable of the scheduler's process
ORIGINS = "respec_origins"  # of response tokens, in a request's meta_info; absent without speculation


def plugin_settings(
    device: str, seeded: bool, steps: DepthSettings | None = None, truncated_logprobs: bool = True
) -> str:
    """Return the value of SETTINGS, as JSON. `steps`: how draft steps are chosen; None if they never change."""
    settings = {"device": device, "seeded": seeded, "steps": steps and steps.to_json()}
    return json.dumps(settings | {"truncated_logprobs": truncated_logprobs})


def read_origins(meta: dict[str, Any], tokens: int, key: str) -> list[int]:
    """Return the origins of a response of `tokens` tokens, from its meta_info.

    sglang pads the lists of one message with None, which means UNDRAFTED here. Raises EngineError, with the request's
    `key`, if the number of origins is not the number of tokens.
    """
    origins = [origin or UNDRAFTED for origin in meta.get(ORIGINS, [UNDRAFTED] * tokens)]
    if len(origins) != tokens:
        raise EngineError(f"request {key}: {len(origins)} origins for {tokens} tokens")
    return origins
