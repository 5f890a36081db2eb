"""Train an EAGLE-3 drafter for an actor on the actor's own responses, in the format stock SGLang loads.

    python tools/train_drafter.py --recipe configs/quickstart-drafter.yaml \\
        --actor .cache/quickstart/actor --data .cache/quickstart/actor/data/train.jsonl --out .cache/quickstart/drafter
    ... training.updates=1000 training.unroll=7 draft_vocab=512     # keys of the recipe
    ... training.updates=null training.epochs=4 training.loss=mixed # or passes over the responses; another loss
    ... --from OTHER_DRAFTER                                        # start from an existing drafter of the same actor

Prints the predicted acceptance of the drafts and tokens of a verify pass, on responses to prompts that the drafter was
not trained on, and warns if the draft vocabulary lacks more than a tenth of their tokens. A folder that was made before
from the same recipe, actor and data is not changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from respec_trainer.config_file import load_config
from respec_trainer.errors import RespecError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="such as configs/quickstart-drafter.yaml")
    parser.add_argument("--actor", type=Path, required=True, help="the target's Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="prompts, .jsonl or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="the drafter's folder to make")
    parser.add_argument("--from", dest="start", type=Path, help="an existing drafter to start from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change")
    args = parser.parse_args()
    from respec_trainer.recipes.drafter import DrafterRecipe, make_drafter

    try:
        recipe = load_config(args.recipe, args.overrides, DrafterRecipe)
        made = make_drafter(recipe, args.actor, args.data, args.out, args.start)
    except RespecError as error:
        print(f"train_drafter: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {'made' if made else 'already made by this recipe, left as it is'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
