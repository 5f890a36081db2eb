from __future__ import annotations

import typing

import pytest
import torch

from respec_trainer import config
from respec_trainer.dtypes import DTYPES, dtype_name, long_name


def test_the_names_are_those_of_the_configuration():
    assert set(DTYPES) == set(typing.get_args(config.DType))


@pytest.mark.parametrize(
    ("name", "dtype", "long", "size"), [("bf16", torch.bfloat16, "bfloat16", 2), ("fp32", torch.float32, "float32", 4)]
)
def test_a_name_and_its_dtype_lead_to_each_other(name, dtype, long, size):
    assert DTYPES[name] is dtype and dtype.itemsize == size
    assert dtype_name(dtype) == name
    assert long_name(dtype) == long and getattr(torch, long) is dtype


def test_a_dtype_without_a_name_is_refused():
    with pytest.raises(KeyError):
        dtype_name(torch.float16)
    assert long_name(torch.float16) == "float16"
