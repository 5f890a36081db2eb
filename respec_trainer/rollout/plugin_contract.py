"""What both sides of an engine must agree on: the plugin's settings, and where a response says its tokens came from.

The plugin (`sglang/inside/plugin.py`) runs in sglang's scheduler. The process that starts the engine imports this
module, and nothing of the plugin.
"""

from __future__ import annotations

import json
from typing import Any

from respec_trainer.errors import EngineError
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.sample import UNDRAFTED

SETTINGS = "RESPEC_ENGINE_PLUGIN"  # environment variable of the scheduler's process
ORIGINS = "respec_origins"  # of response tokens, in a request's meta_info; absent without speculation


def plugin_settings(device: str, seeded: bool, steps: DepthSettings | None = None) -> str:
    """The value of SETTINGS, JSON. `steps`: how draft steps are chosen, None where they never change."""
    return json.dumps({"device": device, "seeded": seeded, "steps": steps and steps.to_json()})


def read_origins(meta: dict[str, Any], tokens: int, key: str) -> list[int]:
    """The origins of a response of `tokens` tokens, from its meta_info.

    Requests of one message fill up with None, which means UNDRAFTED. Raises EngineError for another number of origins
    than of tokens, naming the request by `key`.
    """
    origins = [origin or UNDRAFTED for origin in meta.get(ORIGINS, [UNDRAFTED] * tokens)]
    if len(origins) != tokens:
        raise EngineError(f"request {key}: {len(origins)} origins for {tokens} tokens")
    return origins
