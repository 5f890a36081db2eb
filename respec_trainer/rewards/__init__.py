"""Scoring responses: a batch of items in, a number, a Score with named parts, or None (skip the sample) for each."""
