"""Engines on ranks of their own: the training rank's side, the engine rank's side (`host.py`) and the link."""
