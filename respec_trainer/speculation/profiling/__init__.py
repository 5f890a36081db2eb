"""Profiles: measuring what speculation costs on a machine, fitting the cost model, and choosing settings by it."""
