"""Rewards: functions of a batch of items that return a number, a Score, or None (skip the sample) for each item."""
