"""Recipes for the models that a run starts from: the small actor of the quickstart, and a drafter for any actor."""
