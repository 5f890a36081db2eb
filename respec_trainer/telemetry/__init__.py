"""Reports of a run for its user: metrics, live progress, samples, traces, a summary at the end, and an HTML page."""
