"""Checks of a configuration, on every rank before any process group exists; and `launch/train.py --check`."""
