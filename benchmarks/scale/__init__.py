"""Scale on paper: estimates of a step's memory, traffic and time on clusters that were not available. docs/scale.md."""
