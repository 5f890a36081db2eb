import pytest
import torch

from benchmarks.learner import is_complete, numbers
from benchmarks.policies import Policy, response_kl
from respec_trainer.config import SamplingConfig
from respec_trainer.config_file import dump_config
from respec_trainer.data.prompts import Prompt
from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.errors import ConfigError
from tests.support.models import save_tiny_model, tiny_config, tiny_run_config, tiny_tokenizer

TEMPERATURE = 0.7
END = 2  # the tiny tokenizer's end of text


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> tuple[Policy, Policy]:
    found = []
    for seed in (0, 1):
        folder = save_tiny_model(tmp_path_factory.mktemp("policy"), tiny_config("qwen3"), seed)
        tiny_tokenizer().save_pretrained(folder)
        found.append(Policy(folder, SamplingConfig(temperature=TEMPERATURE, max_new_tokens=2)))
    return found[0], found[1]


@torch.no_grad()
def next_laws(policy: Policy, rows: list[list[int]]) -> torch.Tensor:
    """Return the log-probabilities of the token after each row, [n, V] in float64; all rows have the same length."""
    return (policy.model.double()(torch.tensor(rows)).logits[:, -1] / TEMPERATURE).log_softmax(-1)


def exact_kl(policy: Policy, start: Policy, prompt: list[int]) -> float:
    """Return the KL divergence over responses of at most two tokens, by enumeration."""
    here, there = (next_laws(model, [prompt])[0] for model in (policy, start))
    total = (here.exp() * (here - there)).sum()
    first = [token for token in range(len(here)) if token != END]
    here2, there2 = (next_laws(model, [[*prompt, token] for token in first]) for model in (policy, start))
    total += here[first].exp() @ (here2.exp() * (here2 - there2)).sum(-1)
    for model in (policy, start):
        model.model.float()
    return total.item()


def test_kl_of_responses_is_that_of_their_whole_distribution(policies):
    policy, start = policies
    prompts = [[5, 9, 33, 7], [80, 6]]  # of two lengths, so that one is padded
    exact = [exact_kl(policy, start, ids) for ids in prompts]
    drawn = policy.draw([Prompt("0", tuple(prompts[i % 2]), "", "") for i in range(1024)], seed=0)
    estimate, error = response_kl(policy, start, drawn)
    assert error < 0.1 * sum(exact) / 2  # otherwise the next line tests little
    assert abs(estimate - sum(exact) / 2) < 4 * error  # fails by chance once in 16,000 times
    assert response_kl(policy, policy, drawn)[0] == 0


def test_a_response_ends_with_its_end(policies):
    policy, _ = policies
    assert policy.until_end([7, END, 9, END]) == [7, END]
    assert policy.until_end([7, 9]) == [7, 9]
    rollouts = DrafterBatch.collate([([5, 6], [40, 41, END]), ([5], [42])])
    assert policy.texts(rollouts) == [policy.tokenizer.decode([40, 41]), policy.tokenizer.decode([42])]


def test_sampling_from_a_part_of_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="top_p"):
        Policy(tmp_path, SamplingConfig(max_new_tokens=2, top_p=0.9))


def steps(online: list[float], frozen: list[float], **more) -> list[dict]:
    common = {"reward/mean": 0.5, "rollout/tokens": 100, "time/generate": 0.5, "time/step": 2.0, "policy/entropy": 0.2}
    names = [f"drafter/{kind}_accept_length" for kind in ("measured", "predicted", "frozen")]
    lengths = [(one, 1.01 * one, other) for one, other in zip(online, frozen, strict=True)]
    return [common | more, *(common | more | dict(zip(names, of_step, strict=True)) for of_step in lengths)]


def test_numbers_of_a_run():
    """The means are over the first five steps and the last five; the first step of all has nothing to measure on."""
    found = numbers(steps([3.0] * 5 + [9.0] + [2.8] * 5, [3.0] * 6 + [2.0] * 5, **{"time/learn_exposed": 0.02}))
    assert (found["accept_start"], found["online_end"], found["frozen_end"]) == (3.0, pytest.approx(2.8), 2.0)
    assert (found["online_kept"], found["frozen_kept"]) == (pytest.approx(0.9), 0.5)
    assert found["prediction_error"] == pytest.approx(0.01) and found["entropy_end"] == pytest.approx(0.2)
    assert found["exposed_share"] == pytest.approx(0.01)
    assert found["tokens_per_second"] == pytest.approx(200)


def test_a_run_is_used_again_only_if_it_is_the_same_and_ended(tmp_path):
    config = tiny_run_config("somewhere")
    folder = tmp_path / "run"
    assert not is_complete(folder, config)
    (folder / "actor").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="did not end"):
        is_complete(folder, config)
    (folder / "actor/config.json").write_text("{}")
    assert is_complete(folder, config)
    with pytest.raises(SystemExit, match="another configuration"):
        is_complete(folder, tiny_run_config("elsewhere"))
