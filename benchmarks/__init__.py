"""Benchmarks: scripts that measure what docs/benchmarks.md reports. The package and its tests do not need them."""
