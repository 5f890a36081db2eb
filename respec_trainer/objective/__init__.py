"""What the policy is trained for: advantages, the weight of each token, the loss; `objective.kind` chooses."""
