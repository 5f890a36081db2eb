"""Make the small actor of the quickstart: its tokenizer, its weights, and the word problems to train on.

    python tools/make_actor.py --recipe configs/quickstart-actor.yaml --out .cache/quickstart/actor
    python tools/make_actor.py --recipe configs/quickstart-actor.yaml --out my_actor teaching.steps=2000 seed=1

A folder that the same recipe made before is not changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from respec_trainer.config_file import load_config
from respec_trainer.errors import RespecError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="a YAML file such as configs/quickstart-actor.yaml")
    parser.add_argument("--out", type=Path, required=True, help="the Hugging Face folder to make")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change")
    args = parser.parse_args()
    from respec_trainer.recipes.small_actor import ActorRecipe, make_actor

    try:
        made = make_actor(load_config(args.recipe, args.overrides, ActorRecipe), args.out)
    except RespecError as error:
        print(f"make_actor: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {'made' if made else 'already made by this recipe, left as it is'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
