"""Prepare an audit: its configuration, the environment of a single rank, its prompts, and the possible cells."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Container, Sequence
from itertools import takewhile

from respec_trainer.audit.cells import CONTROL, SHORT, Cell, Mode, all_cells, all_modes
from respec_trainer.audit.tree import Prefix
from respec_trainer.config import Config
from respec_trainer.config_file import load_config
from respec_trainer.errors import ConfigError
from respec_trainer.network import free_port
from respec_trainer.speculation.algorithms import DrafterFolder, algorithm_of

DEEP = 12  # tokens of an answer in a prompt
CANDIDATES = 24  # prompts of the data that are considered
CUTS = (4, 8, 12, 20)  # tokens of a prompt that is cut short
WHOLE_PROMPTS, CUT_PROMPTS = 2, 3
CLOSE = 0.7  # with a lower largest probability, the actor is uncertain at low temperatures too

# Prompts, number of tokens -> the actor's likeliest continuation of each, and the log-probs of its tokens.
Continue = Callable[[Sequence[Sequence[int]], int], tuple[list[list[int]], list[list[float]]]]


def prepare_audit(path: str, overrides: Sequence[str]) -> Config:
    """Load and check the configuration with an audit's overrides, and make this process the only rank of a run."""
    from respec_trainer.compat import prepare
    from respec_trainer.preflight.checks import preflight

    warnings.filterwarnings("ignore")  # libraries warn about missing hardware
    single_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= single_rank | {"MASTER_PORT": str(free_port())}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    first = load_config(path, overrides)
    prepare(first.run.device)
    from respec_trainer.audit.auditor import OVERRIDES

    config = load_config(path, [*overrides, *OVERRIDES])
    preflight(config, 1, 0)
    return config


def wanted_cells(config: Config, part: str, short: bool, control: bool) -> tuple[list[Cell], dict[str, Mode]]:
    """Return the possible cells whose name contains `part`, and all modes by name.

    Args:
        short: choose from the cells of the short form.
        control: return the control's cell alone.

    Raises ConfigError if no cell's name contains `part`.
    """
    modes = all_modes()
    if control:
        return [Cell(CONTROL.name)], modes | {CONTROL.name: CONTROL}
    has_drafter = algorithm_of(config.speculation).folder is DrafterFolder.EAGLE3  # loading checked that it has a path
    possible = [c for c in (SHORT if short else all_cells()) if has_drafter or modes[c.mode].needs == "nothing"]
    cells = [cell for cell in possible if part in cell.name]
    if not cells:
        raise ConfigError(f"no cell's name contains {part!r}; they are: {'; '.join(cell.name for cell in possible)}")
    return cells, modes


def audit_prompts(
    prompts: Sequence[Sequence[int]], go_on: Continue, ends: Container[int], steps: int
) -> tuple[list[Prefix], list[list[int]]]:
    """Return the prompts of an audit, and the likeliest answers to the first and to the second last.

    They are whole prompts of the data, prompts that are cut short, and the first one with half of its answer. Of the
    first two kinds those are chosen where the actor is most often uncertain. Where it is sure, draws prove little, and
    in a response to a whole prompt it is sure of most tokens; what follows half a question is open.

    Args:
        ends: tokens that end a response.
        steps: tokens of a response.
    """
    whole = [tuple(prompt) for prompt in prompts[:CANDIDATES]]
    cut = sorted({prompt[:length] for prompt in whole for length in CUTS if length < len(prompt)})
    chosen = most_uncertain(whole, go_on, ends, steps)[:WHOLE_PROMPTS]
    if cut:
        chosen += most_uncertain(cut, go_on, ends, steps)[:CUT_PROMPTS]
    answers = [_until_end(answer, ends) for answer in go_on([chosen[0], chosen[-1]], DEEP)[0]]
    return [*chosen, (*chosen[0], *answers[0][: len(answers[0]) // 2])], answers


def most_uncertain(prompts: Sequence[Prefix], go_on: Continue, ends: Container[int], steps: int) -> list[Prefix]:
    """Return the prompts in the order of how many tokens of their likeliest responses the actor is uncertain about."""
    answers, logprobs = go_on(prompts, steps)

    def uncertain(index: int) -> int:
        length = len(_until_end(answers[index], ends))
        return sum(logprob < math.log(CLOSE) for logprob in logprobs[index][: length + 1])

    return [prompts[index] for index in sorted(range(len(prompts)), key=uncertain, reverse=True)]


def _until_end(answer: Sequence[int], ends: Container[int]) -> list[int]:
    return list(takewhile(lambda token: token not in ends, answer))
