"""The audit: statistical tests that the rollout engine's samples follow the actor's law.

"Law" means probability distribution throughout this package, most often that of the next token.
"""
