"""GRPO: advantages within a prompt's group of responses, and PPO's clipped loss without a value model."""

from __future__ import annotations

from respec_trainer.objective.advantages import group_advantages
from respec_trainer.objective.aggregation import token_weights
from respec_trainer.objective.losses import clipped_policy_gradient
from respec_trainer.objective.objective import Objective

# arXiv 2402.03300, section 4.1, without its KL term. Variants of later papers are values of the `objective` section:
# advantage=group_mean is Dr. GRPO's (arXiv 2503.20783); aggregation=token and clip_high > clip_low are DAPO's (arXiv
# 2503.14476).
GRPO = Objective(advantages=group_advantages, token_weights=token_weights, loss=clipped_policy_gradient)
