"""A tiny target whose next token depends mostly on the last one, and a drafter that is right without training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from scipy.stats import chisquare

from respec_trainer.rollout.sample import Sample, SamplingParams
from tests.support.models import tiny_config, tiny_model
from tests.support.truncation import truncate

HIDDEN = 64
VOCAB = 131
HEADS, HEAD = 4, 16  # of the drafter: together as wide as the hidden size
SHARPNESS = 2.5


def save_target(folder: Path, family: str, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    """Save a random model of 4 layers: embeddings outweigh what the layers add; its distribution is not flat."""
    model = tiny_model(tiny_config(family, tied=tied, layers=4, vocab_size=VOCAB))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
        for name, weight in model.named_parameters():
            if "o_proj.weight" in name or "down_proj.weight" in name:
                weight.mul_(0.1)
        model.get_output_embeddings().weight.mul_(0.5 if tied else 3)
    model.to(dtype).save_pretrained(folder)
    return folder


def drafter_weights(target: Path, draft_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of an EAGLE-3 drafter that computes the target's last step: head(norm(embedding of the last token)).

    Each token attends only to itself, because equal embeddings match strongly. The attention's output is the embedding
    minus the features of the step before, and the residual stream adds these features again.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    eye, ones = torch.eye(HIDDEN), torch.ones(HIDDEN)
    weights = {
        "fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN),
        "midlayer.self_attn.q_proj.weight": torch.cat((SHARPNESS * eye, 0 * eye), 1),
        "midlayer.self_attn.k_proj.weight": torch.cat((SHARPNESS * eye, 0 * eye), 1),
        "midlayer.self_attn.v_proj.weight": torch.cat((eye, -eye), 1),
        "midlayer.self_attn.o_proj.weight": eye.clone(),
        "midlayer.mlp.gate_proj.weight": torch.zeros(32, HIDDEN),
        "midlayer.mlp.up_proj.weight": torch.zeros(32, HIDDEN),
        "midlayer.mlp.down_proj.weight": torch.zeros(HIDDEN, 32),
        "norm.weight": model.model.norm.weight.detach().clone(),
        "lm_head.weight": model.get_output_embeddings().weight.detach()[draft_ids].clone(),
        "input_norm.weight": torch.ones(3 * HIDDEN),
    }
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    return weights | {f"midlayer.{name}.weight": ones.clone() for name in norms}


def save_drafter(folder: Path, target: Path, draft_ids: torch.Tensor, plain: bool = True) -> Path:
    """Save a drafter in sglang's format. Without `plain` it has a norm before fc, so sglang's own layers compute it."""
    weights = drafter_weights(target, draft_ids)
    if plain:
        weights.pop("input_norm.weight")
    known = torch.zeros(VOCAB, dtype=torch.bool)
    known[draft_ids] = True
    weights |= {"d2t": draft_ids - torch.arange(len(draft_ids)), "t2d": known}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
        "draft_vocab_size": len(draft_ids),
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
            "use_aux_hidden_state": True,
            "norm_before_fc": not plain,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Each with its own truncation; requests of one batch may differ. At most 9 tokens are kept, so each law shows.
TRUNCATED = tuple(
    SamplingParams(24, temperature, top_p, top_k, ignore_eos=True)
    for temperature, top_p, top_k in [(1.5, 0.9, -1), (3.0, 1.0, 5), (2.0, 0.7, 9), (1.0, 1.0, -1)]
)


def check_truncated(reference: Reference, samples: list[Sample], asked: list[SamplingParams]) -> None:
    """Check that log-probs are those of what top_k and top_p keep, and that nothing else was drawn."""
    for sample, params in zip(samples, asked, strict=True):
        expected = reference.truncated_logprobs(tuple(sample.prompt_ids), sample.response_ids, params)
        torch.testing.assert_close(torch.tensor(sample.sampler_logprobs), expected, atol=3e-5, rtol=0)  # fp32 sums


class Reference:
    """The transformers model with which the engine's results are compared."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def logits(self, rows: list[list[int]]) -> torch.Tensor:
        """Return the logits [rows, length, V] in float32; all rows have the same length."""
        return self.model(torch.tensor(rows)).logits.float()

    def p_value(self, prompt: tuple[int, ...], responses: list[list[int]], length: int, temperature: float) -> float:
        """Test the first `length` tokens of the responses against the exact distribution, and return the p-value.

        Sequences too rare to test are pooled.
        """
        exact = self.law(prompt, length, temperature, least=5 / len(responses))
        assert len(exact) >= 20, "nothing to test: the distribution is nearly one point"
        drawn = Counter(tuple(response[:length]) for response in responses)
        observed = [drawn[sequence] for sequence in exact]
        expected = [mass * len(responses) for mass in exact.values()]
        rest = len(responses) - sum(observed), len(responses) - sum(expected)
        return float(chisquare([*observed, rest[0]], [*expected, rest[1]]).pvalue)

    def greedy(self, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
        row = list(prompt)
        for _ in range(new_tokens):
            row.append(int(self.logits([row])[0, -1].argmax()))
        return row[len(prompt) :]

    def law(self, prompt: tuple[int, ...], length: int, temperature: float, least: float) -> dict[tuple, float]:
        """Return the probability of every sequence of `length` tokens after the prompt, if it is at least `least`."""
        found: dict[tuple, float] = {(): 1.0}
        for _ in range(length):
            logits = self.logits([[*prompt, *prefix] for prefix in found])[:, -1].double()
            probs = (logits / temperature).softmax(-1)
            longer = {}
            for (prefix, mass), row in zip(found.items(), probs, strict=True):
                longer |= {(*prefix, t): mass * p for t, p in enumerate(row.tolist()) if mass * p >= least}
            found = longer
        return found

    def logprobs(self, prompt: tuple[int, ...], response: list[int], temperature: float = 1.0) -> torch.Tensor:
        """Return the log-prob of each response token at the temperature."""
        row = [*prompt, *response]
        scores = (self.logits([row])[0] / temperature).log_softmax(-1)
        return scores[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]

    def truncated_logprobs(self, prompt: tuple[int, ...], response: list[int], params: SamplingParams) -> torch.Tensor:
        """Return the log-prob of each response token in what the parameters' top_k and top_p keep."""
        probs = (self.logits([[*prompt, *response]])[0].double() / params.temperature).softmax(-1).numpy()
        kept = [truncate(row, params.top_k, params.top_p) for row in probs[len(prompt) - 1 : -1]]
        return torch.tensor([row[token] for row, token in zip(kept, response, strict=True)]).log().float()
