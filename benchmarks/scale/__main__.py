"""The entry point of `python -m benchmarks.scale`; see run.py."""

from __future__ import annotations

from benchmarks.scale.run import main

main()
