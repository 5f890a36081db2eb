"""The command respec-convert, one process without ranks: converts, compares and describes models."""
