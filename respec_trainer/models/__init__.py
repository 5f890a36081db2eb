"""Model families: all that differs between them, one file a family. Other packages look it up there.

This package imports neither torch nor transformers, because the engine's processes import it too.
"""
