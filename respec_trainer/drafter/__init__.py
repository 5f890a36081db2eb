"""The EAGLE-3 drafter: its module, SGLang's file format for it, its losses, and distillation."""
