"""Our side of an sglang engine: runs in the process of the rank that starts the engine, and starts its processes."""
