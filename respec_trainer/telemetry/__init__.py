"""What a run tells its user: metrics, a live line for each phase, samples, and a closing summary."""
