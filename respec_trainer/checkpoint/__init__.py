"""Weights at rest and on the way: the map between Hugging Face and Megatron names and shapes, and files."""
