"""data/prompts.py: the contents of prompts, dropped prompts, and the stream's order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import xxhash

from respec_trainer.config import DataConfig
from respec_trainer.data.prompts import Prompt, PromptStream, check_tokenizer_fits, load_prompts
from respec_trainer.errors import ConfigError, DataError
from tests.support.data import GSM8K

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(5)]


class Characters:
    """A tokenizer of characters."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def __len__(self):
        return 128


def config(path, **keys) -> DataConfig:
    return DataConfig(path=str(path), prompts_per_step=2, **keys)


def write(path: Path, lines) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_jsonl_and_parquet_load_alike(tmp_path):
    jsonl = write(tmp_path / "rows.jsonl", ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    template = "Q: {prompt}\nA: "
    one, two = (
        list(load_prompts(config(p, template=template), Characters(), 100)) for p in (jsonl, tmp_path / "rows.parquet")
    )
    assert one == two
    assert one[1].text == "Q: What is 1 + 1?\nA: " and one[1].answer == "#### 2" and one[1].key == "2"
    assert one[1].ids == tuple(map(ord, one[1].text))


def test_prompts_carry_the_other_columns_of_their_row(tmp_path):
    others = {"level": 3, "tags": ["a", None], "extra_info": {"split": "train", "index": 1.5}, "seen": False}
    jsonl = write(tmp_path / "rows.jsonl", [ROWS[0] | others, ROWS[1]])
    known, none = load_prompts(config(jsonl), Characters(), 100)
    assert known.row == others and none.row == {}
    assert hash(known) and known == replace(known) != replace(known, row={})


def test_long_prompts_are_dropped_and_counted(tmp_path):
    rows = [{"question": "a" * n, "answer": "1"} for n in (3, 9, 4)]
    prompts = load_prompts(config(write(tmp_path / "r.jsonl", rows)), Characters(), limit=4)
    assert len(prompts) == 2 and prompts.dropped == 1 and prompts.limit == 4
    with pytest.raises(DataError, match="shortest has 3"):
        load_prompts(config(tmp_path / "r.jsonl"), Characters(), limit=2)


def test_an_empty_prompt_is_dropped_and_counted(tmp_path):
    """A model cannot continue nothing: there is no position whose distribution it could draw from."""
    rows = [{"question": text, "answer": "1"} for text in ("ab", "", "c")]
    prompts = load_prompts(config(write(tmp_path / "r.jsonl", rows)), Characters(), limit=4)
    assert [prompt.text for prompt in prompts] == ["ab", "c"] and prompts.dropped == 1


def test_a_tokenizer_that_loses_a_text_is_no_use(tmp_path):
    class Forgetful(Characters):
        def __call__(self, texts, add_special_tokens):
            return {"input_ids": super().__call__(texts, add_special_tokens)["input_ids"][1:]}

    with pytest.raises(ValueError, match="shorter"):
        load_prompts(config(write(tmp_path / "r.jsonl", ROWS)), Forgetful(), 100)


def test_tokenizer_larger_than_the_model():
    class HFConfig:
        vocab_size = 100

    with pytest.raises(ConfigError, match="128 tokens"):
        check_tokenizer_fits(Characters(), HFConfig, "folder")
    HFConfig.vocab_size = 128
    check_tokenizer_fits(Characters(), HFConfig, "folder")


PROMPTS = [Prompt(str(i), (i,), str(i), str(i)) for i in range(7)]


def test_every_epoch_holds_every_prompt_once_in_a_new_order():
    stream = PromptStream(PROMPTS, seed=3)
    epochs = [[p.key for p in stream.next(7)] for _ in range(3)]
    assert all(sorted(epoch) == [p.key for p in PROMPTS] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [p.key for p in PromptStream(PROMPTS, seed=3).next(7)] == epochs[0]
    assert [p.key for p in PromptStream(PROMPTS, seed=4).next(7)] != epochs[0]


def test_no_epoch_of_one_seed_is_an_epoch_of_another():
    """So runs whose seeds are neighbors are independent: one is not the other, begun an epoch later."""
    many = [Prompt(str(i), (i,), str(i), str(i)) for i in range(20)]  # 20! orders: none comes twice by chance
    orders = set()
    for seed in range(6):
        stream = PromptStream(many, seed)
        orders |= {tuple(p.key for p in stream.next(20)) for _ in range(6)}
    assert len(orders) == 36


def test_a_stream_continues_from_its_state():
    stream = PromptStream(PROMPTS, seed=3)
    stream.next(10)
    again = PromptStream(PROMPTS, seed=3)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert again.next(12) == stream.next(12)


def test_a_stream_of_other_prompts_is_refused():
    state = PromptStream(PROMPTS, seed=3).state_dict()
    others = [
        (PromptStream(PROMPTS, seed=4), "seed is 3, but now it is 4"),
        (PromptStream(PROMPTS, seed=3, shuffle=False), "shuffle is True, but now it is False"),
        (PromptStream(PROMPTS[:-1], seed=3), "prompts is 7, but now it is 6"),
        (PromptStream([*PROMPTS[:-1], replace(PROMPTS[-1], answer="?")], seed=3), "digest is"),
        (PromptStream([*PROMPTS[:-1], replace(PROMPTS[-1], text="?")], seed=3), "digest is"),
        (PromptStream([*PROMPTS[:-1], replace(PROMPTS[-1], key="?")], seed=3), "digest is"),
        (PromptStream([PROMPTS[1], PROMPTS[0], *PROMPTS[2:]], seed=3), "digest is"),
        (PromptStream([*PROMPTS[:-1], replace(PROMPTS[-1], row={"level": 1})], seed=3), "digest is"),
    ]
    for stream, message in others:
        with pytest.raises(DataError, match=message):
            stream.load_state_dict(state)


def test_a_state_is_read_by_later_versions():
    """The digest is of key, text and answer of each prompt, each ended by a zero, and of its row if it has one."""
    content = "".join(f"{i}\0{i}\0{i}\0" for i in range(6)) + '6\0006\0006\0{"a": [1], "b": 2}'
    prompts = [*PROMPTS[:-1], replace(PROMPTS[-1], row={"b": 2, "a": [1]})]
    expected = {"epoch": 0, "position": 0, "seed": 3, "shuffle": True, "prompts": 7}
    assert PromptStream(prompts, seed=3).state_dict() == expected | {
        "digest": xxhash.xxh3_64_hexdigest(content.encode())
    }


def test_the_rest_of_an_epoch_comes_before_the_next_one():
    stream = PromptStream(PROMPTS, seed=0, shuffle=False)
    taken = ["".join(p.key for p in stream.next(5)) for _ in range(3)]
    assert taken == ["01234", "56012", "34560"] and (stream.epoch, stream.position) == (2, 1)
    stream.next(6)
    assert (stream.epoch, stream.position) == (2, 7), "the next epoch begins when a prompt of it is taken"


def test_more_than_an_epoch_at_once():
    assert len(PromptStream(PROMPTS, seed=0, shuffle=False).next(20)) == 20
    assert [p.key for p in PromptStream(PROMPTS, seed=0, shuffle=False).next(8)] == list("0123456") + ["0"]


@pytest.mark.skipif(not (GSM8K / "test.jsonl").is_file(), reason=f"no GSM8K at {GSM8K}; set RESPEC_DATA")
def test_gsm8k_loads_unchanged():
    class Words(Characters):
        def __call__(self, texts, add_special_tokens):
            return {"input_ids": [text.split() for text in texts]}

    prompts = load_prompts(config(GSM8K / "test.jsonl"), Words(), 1000)
    assert len(prompts) == 1319 and prompts.dropped == 0
    assert prompts[0].answer.endswith("#### 18")
