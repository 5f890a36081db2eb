"""The Adaptive Server: the cost of speculation on this hardware, and policies that choose draft steps by it."""
