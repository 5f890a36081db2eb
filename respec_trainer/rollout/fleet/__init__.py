"""All engines of a run, as each rank that trains sees them: which engine draws which response."""
