"""Reports of a run, written by the first rank: metrics, live progress, samples, traces, a summary, an HTML page."""
