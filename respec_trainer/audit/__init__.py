"""Proof, by test, that what the rollout engine draws follows the actor's law."""
