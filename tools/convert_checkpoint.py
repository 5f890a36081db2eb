"""Convert models between Hugging Face folders and checkpoints, compare them, and show their contents.

    python tools/convert_checkpoint.py to-megatron --hf Qwen2.5-3B --out converted --tp 2
    python tools/convert_checkpoint.py to-hf --checkpoint runs/NAME/checkpoints/step_40 --out my_model
    python tools/convert_checkpoint.py verify my_model runs/NAME/checkpoints/step_40 --tolerance 0.01
    python tools/convert_checkpoint.py --help

The same as the command respec-convert; see docs/convert.md.
"""

from __future__ import annotations

import sys

from respec_trainer.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
