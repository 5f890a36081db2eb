"""Reinforcement learning of language models with adaptive speculative rollouts.

Importing this package is cheap and imports neither torch nor CUDA; its subpackages import what they need.
"""

__version__ = "0.1.0"
