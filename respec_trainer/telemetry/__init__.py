"""What a run tells its user: metrics, a live line for each phase, samples, traces, a closing summary and a page."""
