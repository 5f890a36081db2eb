"""What each family of models has of its own, one file a family. Every other package asks the family.

Needs neither torch nor transformers, for the engine's processes ask too.
"""
