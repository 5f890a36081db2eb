"""Folders of data sets, which tests use if they exist."""

from __future__ import annotations

import os
from pathlib import Path

GSM8K = Path(os.environ.get("RESPEC_DATA", Path(__file__).parents[3] / "shared/data")) / "gsm8k"
