"""Scale on paper: what a step takes in memory, traffic and time on clusters that nobody here has. docs/scale.md."""
