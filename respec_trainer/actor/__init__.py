"""The policy being trained, on every rank that trains: Megatron tensor parallelism inside a DeepSpeed ZeRO engine."""

import warnings

from respec_trainer.compat.deepspeed_cpu import settle_accelerator

settle_accelerator()  # before a module of this package imports DeepSpeed
# Megatron warns about optional libraries while it is imported, and calls deprecated torch functions. A user of this
# package can do nothing about either.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
