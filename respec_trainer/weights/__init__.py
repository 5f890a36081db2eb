"""Weights between Hugging Face and Megatron by the family's rules, and safetensors files, read and written."""
