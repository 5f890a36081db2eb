"""The Online Learner: trains the drafter during a run, on every rank that trains."""
