"""rollout/sglang/delivery.py: readers get whole messages only."""

from __future__ import annotations

from types import SimpleNamespace

from respec_trainer.rollout.sglang.delivery import Deliveries


def state(*tokens, origins=()):
    logprobs = [(-float(token), token, None) for token in tokens]
    info = {"origins": list(origins)} if origins else {}
    return SimpleNamespace(output_ids=list(tokens), output_token_logprobs=logprobs, customized_info_accumulated=info)


def message(rids, reasons, verified=True):
    count = len(rids)
    return SimpleNamespace(
        rids=rids,
        finished_reasons=reasons,
        spec_verify_ct=[3] * count if verified else [],
        spec_correct_drafts_histogram=[[1, 2]] * count if verified else [],
        cached_tokens=[4] * count,
    )


def test_tokens_after_the_last_whole_message_are_left_out():
    deliveries = Deliveries()
    running, finished = state(5, 6, origins=[0, 1]), state(7)
    deliveries.commit([running, finished, None], message(["a", "b", "gone"], [None, {"type": "stop"}, None]))
    running.output_ids.append(9)
    running.output_token_logprobs.append((-9.0, 9, None))
    running.customized_info_accumulated["origins"].append(2)
    output = deliveries.output("a")
    assert output["output_ids"] == [5, 6]
    assert output["meta_info"]["output_token_logprobs"] == [(-5.0, 5, None), (-6.0, 6, None)]
    assert output["meta_info"]["origins"] == [0, 1]
    assert output["meta_info"]["finish_reason"] == {"type": "lost"}
    assert output["meta_info"]["spec_verify_ct"] == 3
    assert output["meta_info"]["spec_correct_drafts_histogram"] == [1, 2]
    assert deliveries.output("b")["meta_info"]["finish_reason"] == {"type": "stop"}
    for rid in ("gone", "unknown"):
        assert deliveries.output(rid)["output_ids"] == []


def test_without_speculation_and_after_removal():
    deliveries = Deliveries()
    deliveries.commit([state(5), state(6)], message(["a", "b"], [None, {"type": "abort"}], verified=False))
    assert deliveries.output("a")["meta_info"]["spec_verify_ct"] == 0
    assert deliveries.output("b")["output_ids"] == [], "tokens of aborted requests are drawn again"
    deliveries.remove(["a", "unknown"])
    assert deliveries.output("a")["output_ids"] == []
