"""A simulator of rollouts: how long a recorded rollout takes under another policy of draft steps, without an engine."""
