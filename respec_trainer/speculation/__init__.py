"""The Adaptive Server: the cost of speculation on this hardware, policies that follow from it, and their simulation."""
