"""Builds, from a Hugging Face config, a Megatron-core GPTModel that scores tokens inside its forward pass.

Scoring is inside the forward pass for two reasons: the engine's hooks, in which ZeRO-3 gathers weights, then cover the
use of the output weight; and logits of the whole batch are never in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig

from respec_trainer.actor.check import check_model
from respec_trainer.actor.layers import decoder_spec, tag_sharded_parameters
from respec_trainer.actor.logprob import chunked_logprobs, mask_padding
from respec_trainer.actor.truncation import Truncation
from respec_trainer.capture import LayerOutputs
from respec_trainer.config import ActorConfig, SamplingConfig
from respec_trainer.models.registry import family_of
from respec_trainer.models.rules import head_dim, padded_vocab_size


class PolicyModel(GPTModel):
    """A GPTModel whose forward pass returns the log-probs of given tokens, not all logits."""

    def __init__(self, hf_config, config: TransformerConfig, sampling: SamplingConfig, chunk: int):
        super().__init__(
            config=config,
            transformer_layer_spec=decoder_spec(config),
            vocab_size=padded_vocab_size(hf_config, config.tensor_model_parallel_size),
            max_sequence_length=hf_config.max_position_embeddings,
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            position_embedding_type="rope",
            parallel_output=True,
        )
        self.true_vocab_size, self.temperature, self.chunk = hf_config.vocab_size, sampling.temperature, chunk
        self.truncation = Truncation() if sampling.allow_untruncated else Truncation(sampling.top_k, sampling.top_p)
        self.rotary_pos_emb.inv_freq = rope_frequencies(hf_config)

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        want: Literal["logprobs", "logits"] = "logprobs",
        layers: Sequence[int] = (),
    ):
        """Score `tokens` [B, S], right-padded; S must be a multiple of tp under sequence parallelism.

        "logprobs": `mask` [B, S] marks the n tokens to score, none of them a row's first. Returns log-probs and
        entropies [B, S] in float32: entry t is for token t given those before it, at the model's temperature and
        truncation; 0 where the mask is False. With `layers` it returns three more tensors: the hidden states that
        predict the marked tokens, after the final norm, row by row [n, H]; their log-sum-exps at the model's
        temperature [n], of the whole vocabulary; and the outputs of those layers [B, S, len(layers) * H].

        "logits": `mask` [B, S] marks n positions. Returns the logits at them, [n, V / tp], at temperature 1.
        """
        embedded, rotary = self._preprocess(input_ids=tokens, position_ids=None)[:2]
        with LayerOutputs(self.decoder.layers, layers) as outputs:
            hidden = self.decoder(hidden_states=embedded, attention_mask=None, rotary_pos_emb=rotary)
        if want == "logits":
            return self._logits(hidden, mask)
        return (*self._score(hidden, tokens, mask, bool(layers)), *([self._whole(outputs)] if layers else []))

    def _score(self, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, states: bool):
        chosen = self._select(hidden, mask.roll(-1, 1))  # the token at t is predicted at t - 1
        scored, entropies, logsumexp = chunked_logprobs(
            chosen,
            self._output_weight(),
            tokens[mask],
            vocab_size=self.true_vocab_size,
            temperature=self.temperature,
            truncation=self.truncation,
            chunk=self.chunk,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        blank = scored.new_zeros(tokens.shape)
        scores = blank.masked_scatter(mask, scored), blank.masked_scatter(mask, entropies)
        return (*scores, chosen, logsumexp) if states else scores

    def _whole(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Return whole layer outputs [B, S, layers * H] from this rank's part of each."""
        if self.config.sequence_parallel:
            outputs = [gather_from_sequence_parallel_region(part) for part in outputs]
        return torch.cat(outputs, -1).transpose(0, 1)

    def _logits(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = self._select(hidden, mask) @ self._output_weight().t()
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[1]
        return mask_padding(logits, first, self.true_vocab_size)

    def _select(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the masked positions of hidden states [S (/ tp), B, H] as [n, H]; sum their gradient over TP."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True).transpose(0, 1)[mask]
        return copy_to_tensor_model_parallel_region(hidden.transpose(0, 1)[mask])

    def vocabulary_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's rows of the embedding and of the output layer, [V / tp, H] each, padding at the end."""
        return self.embedding.word_embeddings.weight, self._output_weight()

    def _output_weight(self) -> torch.Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_model(
    hf_config, actor: ActorConfig, dtype: torch.dtype, device: torch.device, sampling: SamplingConfig
) -> PolicyModel:
    """Return the model with undefined weights, its shards marked for DeepSpeed. Needs Megatron's process groups."""
    check_model(hf_config, actor.parallel.tp)
    config = megatron_config(hf_config, actor, dtype, device)
    model = PolicyModel(hf_config, config, sampling, actor.logprob_chunk)
    tag_sharded_parameters(model)
    return model


def megatron_config(hf_config, actor: ActorConfig, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    """Return Megatron's config of the same model. Fused kernels are off: they need Transformer Engine or Apex."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        ffn_hidden_size=hf_config.intermediate_size,
        layernorm_epsilon=hf_config.rms_norm_eps,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=actor.parallel.tp,
        sequence_parallel=actor.parallel.sequence_parallel,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,  # every weight is loaded
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **family_of(hf_config).megatron,
        **(recompute if actor.recompute else {}),
    )


def rope_frequencies(hf_config) -> torch.Tensor:
    """Return RoPE's inverse frequencies [head_dim / 2], scaled by transformers' functions as the config requires.

    Megatron also has Llama 3's scaling, but with fixed constants; transformers uses those of the config.
    """
    rope = hf_config.rope_parameters
    if rope["rope_type"] == "default":
        size = head_dim(hf_config)
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, attention_scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf_config, torch.device("cpu"))
    assert attention_scale == 1.0, "check_model accepts only variants that scale nothing but frequencies"
    return frequencies
