"""Sample generation: the rollout engines, and the parts that sglang needs on a machine without a GPU."""
