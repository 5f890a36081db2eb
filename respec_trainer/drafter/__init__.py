"""The EAGLE-3 drafter: the model, SGLang's format for it, and learning from the actor's own rollouts."""
