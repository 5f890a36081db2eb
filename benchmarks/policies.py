"""Policies from Hugging Face folders: draw responses from one, and measure its divergence from another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.config import Config, SamplingConfig
from respec_trainer.data.prompts import Prompt, PromptStream, load_prompts
from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.errors import ConfigError

BATCH = 128  # responses drawn or scored at once


class Policy:
    """A float32 model and its tokenizer. It samples by `sampling`, which must keep the whole vocabulary."""

    def __init__(self, folder: Path | str, sampling: SamplingConfig):
        define_torchvision_operators()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if sampling.top_p < 1 or sampling.top_k > 0 or sampling.stop:
            raise ConfigError("rollout.sampling: top_p, top_k and stop are not reproduced here; leave them out")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.sampling = sampling

    def prompts(self, config: Config, seed: int, count: int) -> list[Prompt]:
        """Return `count` prompts of the run's data, in the random order of this seed."""
        found = load_prompts(config.data, self.tokenizer, config.data.max_prompt_tokens)
        return PromptStream(found, seed).next(count)

    def draw(self, prompts: Sequence[Prompt], seed: int) -> DrafterBatch:
        """Draw one response for each prompt, with its end token. The seed determines the draws."""
        torch.manual_seed(seed)  # transformers' generate takes no generator
        pairs = []
        for start in range(0, len(prompts), BATCH):
            pairs += self._draw([prompt.ids for prompt in prompts[start : start + BATCH]])
        return DrafterBatch.collate(pairs)

    def _draw(self, prompts: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[int]]]:
        width = max(len(ids) for ids in prompts)
        tokens = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        drawn = self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=self.sampling.temperature,
            top_k=0,
            max_new_tokens=self.sampling.max_new_tokens,
            pad_token_id=0,
        )
        return [(ids, self.until_end(row)) for ids, row in zip(prompts, drawn[:, width:].tolist(), strict=True)]

    def until_end(self, response: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return response[: response.index(end) + 1] if end in response else response

    def texts(self, rollouts: DrafterBatch) -> list[str]:
        """Return the responses' texts."""
        rows = zip(rollouts.tokens, rollouts.response_mask, strict=True)
        responses = [tokens[mask].tolist() for tokens, mask in rows]
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True)

    @torch.no_grad()
    def log_probs(self, rollouts: DrafterBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield for each batch of M response tokens their log-probabilities [M, V] and rows in `rollouts` [M]."""
        for index in torch.arange(len(rollouts)).split(BATCH):
            batch = rollouts.rows(index)
            logits = self.model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
            of_response = batch.response_mask[:, 1:]
            rows = index[:, None].expand_as(of_response)[of_response]
            yield (logits[of_response] / self.sampling.temperature).log_softmax(-1), rows


def response_kl(policy: Policy, start: Policy, rollouts: DrafterBatch) -> tuple[float, float]:
    """Estimate KL(policy || start) in nats a response, and its standard error, from responses drawn from `policy`.

    By the chain rule it is the mean over responses of sum_t KL(policy(. | x_<t) || start(. | x_<t)), each over the
    whole vocabulary. This has the same mean as the sum of the log-ratios of the drawn tokens, and less variance.
    """
    sums = torch.zeros(len(rollouts), dtype=torch.float64)
    for (ours, rows), (others, _) in zip(policy.log_probs(rollouts), start.log_probs(rollouts), strict=True):
        sums.index_add_(0, rows, (ours.exp() * (ours - others)).sum(-1).double())
    return sums.mean().item(), sums.std().item() / math.sqrt(len(sums))
