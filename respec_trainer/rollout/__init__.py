"""What all rollout engines have in common, and what the trainer's side and sglang's side of an engine agree on."""
