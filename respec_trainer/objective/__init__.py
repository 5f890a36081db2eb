"""Objectives of the policy: advantages, token weights and the loss; `objective.kind` chooses one."""
