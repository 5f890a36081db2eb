"""A byte-level BPE tokenizer of a few hundred tokens, in which every digit is a token of its own."""

from __future__ import annotations

from collections.abc import Iterable

PAD, BEGIN, END = "<pad>", "<s>", "</s>"  # ids 0, 1, 2


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Learn merges from `texts`; returns a transformers tokenizer that adds no special tokens of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END)
