"""A tiny target whose next token hangs mostly on the last one, and a drafter for it that is right without training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from scipy.stats import chisquare

from tests.support.models import tiny_config, tiny_model

HIDDEN = 64
VOCAB = 131
HEADS, HEAD = 4, 16  # of the drafter: together as wide as the hidden size
SHARPNESS = 2.5


def save_target(folder: Path, family: str, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    """A random model of 4 layers whose embedding outweighs what its layers add, and whose law is not flat."""
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
    """An EAGLE-3 drafter that knows the target's last step: logits = head(norm(embedding of the last token)).

    Its attention looks at the token itself only, because like embeddings match sharply, and carries the embedding,
    less the features of the step before, which the residual stream would add again.
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
    """Save it in sglang's format; not `plain` with a norm before fc, so that sglang's own layers compute it."""
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


class Reference:
    """transformers' answer to what the engine says."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def logits(self, rows: list[list[int]]) -> torch.Tensor:
        """[rows, length, V] in float32, of rows of one length."""
        return self.model(torch.tensor(rows)).logits.float()

    def p_value(self, prompt: tuple[int, ...], responses: list[list[int]], length: int, temperature: float) -> float:
        """Of the first `length` tokens of these draws under the exact law; sequences too rare to test are pooled."""
        law = self.law(prompt, length, temperature, least=5 / len(responses))
        assert len(law) >= 20, "nothing to test: the law is nearly one point"
        drawn = Counter(tuple(response[:length]) for response in responses)
        observed = [drawn[sequence] for sequence in law]
        expected = [mass * len(responses) for mass in law.values()]
        rest = len(responses) - sum(observed), len(responses) - sum(expected)
        return float(chisquare([*observed, rest[0]], [*expected, rest[1]]).pvalue)

    def greedy(self, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
        row = list(prompt)
        for _ in range(new_tokens):
            row.append(int(self.logits([row])[0, -1].argmax()))
        return row[len(prompt) :]

    def law(self, prompt: tuple[int, ...], length: int, temperature: float, least: float) -> dict[tuple, float]:
        """Probability of every sequence of `length` tokens after the prompt that has at least `least` of it."""
        law: dict[tuple, float] = {(): 1.0}
        for _ in range(length):
            logits = self.logits([[*prompt, *prefix] for prefix in law])[:, -1].double()
            probs = (logits / temperature).softmax(-1)
            longer = {}
            for (prefix, mass), row in zip(law.items(), probs, strict=True):
                longer |= {(*prefix, t): mass * p for t, p in enumerate(row.tolist()) if mass * p >= least}
            law = longer
        return law

    def logprobs(self, prompt: tuple[int, ...], response: list[int], temperature: float = 1.0) -> torch.Tensor:
        """Of each response token, at the temperature."""
        row = [*prompt, *response]
        law = (self.logits([row])[0] / temperature).log_softmax(-1)
        return law[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]
