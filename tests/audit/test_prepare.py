"""audit/prepare.py: the prompts of an audit."""

from __future__ import annotations

import math

from respec_trainer.audit.prepare import CANDIDATES, DEEP, audit_prompts, most_uncertain

END = 0


class Model:
    """Its answer to a prompt is the prompt's last token again and again; it is unsure as often as `unsure` says."""

    def __init__(self, unsure: dict, ends_after: int = 100):
        self.unsure, self.ends_after, self.asked = unsure, ends_after, []

    def __call__(self, prompts, steps):
        self.asked.append((list(prompts), steps))
        length = min(steps, self.ends_after)
        answers = [[prompt[-1]] * length + [END] * (steps - length) for prompt in prompts]
        logprobs = [
            [math.log(0.69 if step < self.unsure.get(tuple(prompt), 0) else 0.71) for step in range(steps)]
            for prompt in prompts
        ]
        return answers, logprobs


def test_prompts_are_ordered_by_how_often_the_actor_is_uncertain():
    unsure = {(1,): 3, (2,): 7, (3,): 0, (4,): 10}
    model = Model(unsure)
    assert most_uncertain(list(unsure), model, {END}, 10) == [(4,), (2,), (1,), (3,)]
    assert model.asked == [([(1,), (2,), (3,), (4,)], 10)]


def test_what_follows_the_end_of_a_response_does_not_count():
    sure, unsure = math.log(0.9), math.log(0.5)

    def go_on(prompts, steps):
        rows = [([1, END, 3, 3], [sure, sure, unsure, unsure]), ([1, END, 3, 3], [sure, unsure, sure, sure])]
        answers, logprobs = zip(*rows, strict=True)
        return list(answers), list(logprobs)

    assert most_uncertain([(5,), (7,)], go_on, {END}, 4) == [(7,), (5,)]


def test_an_audit_has_whole_prompts_cut_ones_and_one_with_half_its_answer():
    prompts = [tuple(range(start, start + 30)) for start in (100, 200, 300, 400, 500)]
    unsure = {prompts[1]: 9, prompts[4]: 8, prompts[2]: 7, prompts[1][:8]: 3, prompts[0][:20]: 4, prompts[3][:4]: 2}
    chosen, answers = audit_prompts(prompts, Model(unsure), {END}, 10)
    assert chosen[:5] == [prompts[1], prompts[4], prompts[0][:20], prompts[1][:8], prompts[3][:4]]
    assert chosen[5:] == [(*prompts[1], *[229] * (DEEP // 2))]
    assert answers == [[229] * DEEP, [403] * DEEP]
    chosen, answers = audit_prompts(prompts, Model(unsure, ends_after=2), {END}, 10)
    assert answers == [[229] * 2, [403] * 2] and chosen[5] == (*prompts[1], 229)


def test_short_prompts_are_not_cut_and_equal_beginnings_count_once():
    model = Model({})
    assert audit_prompts([(1, 2, 3), (4, 5, 6, 7)], model, {END}, 5)[0] == [
        (1, 2, 3),
        (4, 5, 6, 7),
        (1, 2, 3, *[3] * (DEEP // 2)),
    ]
    assert [len(asked) for asked, _ in model.asked] == [2, 2], "there is nothing to cut"
    model = Model({})
    audit_prompts([(1, 2, 3, 4, 5), (1, 2, 3, 4, 6)], model, {END}, 5)
    assert model.asked[1] == ([(1, 2, 3, 4)], 5)


def test_the_first_prompts_of_the_data_are_considered():
    model = Model({})
    audit_prompts([(index,) * 5 for index in range(1, CANDIDATES + 10)], model, {END}, 5)
    assert len(model.asked[0][0]) == len(model.asked[1][0]) == CANDIDATES
