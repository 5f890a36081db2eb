"""The Adaptive Server: what speculation costs on this hardware, when it pays, and how a rollout goes under a policy."""
