"""audit/prepare.py: the prompts of an audit."""

from __future__ import annotations

import math

from respec_trainer.audit.prepare import CANDIDATES, CUT_PROMPTS, DEEP, audit_prompts, uncertain_starts

END = 0


class Model:
    """Its answer to a prompt is the prompt's last token again and again; it is unsure as often as `unsure` says."""

    def __init__(self, unsure: dict, ends_after: int = 100):
        self.unsure, self.ends_after, self.asked = unsure, ends_after, []

    def __call__(self, prompts, steps):
        self.asked.append((list(prompts), steps))
        answers = [
            [prompt[-1]] * min(steps, self.ends_after) + [END] * max(0, steps - self.ends_after) for prompt in prompts
        ]
        logprobs = [
            [math.log(0.69 if step < self.unsure.get(tuple(prompt), 0) else 0.71) for step in range(steps)]
            for prompt in prompts
        ]
        return answers, logprobs


def test_the_beginnings_that_leave_most_open_are_chosen():
    prompts = [tuple(range(start, start + 30)) for start in (100, 200, 300)]
    unsure = {prompts[2][:8]: 9, prompts[0][:20]: 7, prompts[1][:4]: 8, prompts[1][:12]: 6, prompts[1][:20]: 5}
    model = Model(unsure)
    assert (
        uncertain_starts(prompts, model, {END}, 10) == [p for p, _ in sorted(unsure.items(), key=lambda i: -i[1])][:3]
    )
    assert CUT_PROMPTS == 3 and model.asked[0][1] == 10


def test_what_follows_the_end_of_a_response_does_not_count():
    prompts = [(5,) * 4 + (6,), (7,) * 4 + (8,)]
    assert uncertain_starts(prompts, Model({(5,) * 4: 9, (7,) * 4: 3}, ends_after=2), {END}, 10)[0] == (5,) * 4

    def go_on(cuts, steps):
        sure, unsure = math.log(0.9), math.log(0.5)
        rows = {
            (5,) * 4: ([1, END, 3, 3], [sure, sure, unsure, unsure]),
            (7,) * 4: ([1, END, 3, 3], [sure, unsure, sure, sure]),
        }
        answers, logprobs = zip(*(rows[cut] for cut in cuts), strict=True)
        return list(answers), list(logprobs)

    assert uncertain_starts(prompts, go_on, {END}, 4)[0] == (7,) * 4


def test_short_prompts_are_not_cut_and_equal_beginnings_count_once():
    assert uncertain_starts([(1, 2, 3), (4, 5, 6, 7)], Model({}), {END}, 5) == []
    assert uncertain_starts([(1, 2, 3, 4, 5), (1, 2, 3, 4, 6)], Model({}), {END}, 5) == [(1, 2, 3, 4)]
    many = [(index,) * 5 for index in range(1, CANDIDATES + 10)]
    model = Model({})
    uncertain_starts(many, model, {END}, 5)
    assert len(model.asked[0][0]) == CANDIDATES


def test_an_audit_has_a_whole_prompt_its_answer_and_cut_prompts():
    prompts = [tuple(range(start, start + 30)) for start in (100, 200)]
    chosen, answers = audit_prompts(prompts, Model({prompts[1][:8]: 3}), {END}, 10)
    assert chosen[:2] == prompts and chosen[2] == prompts[1][:8] and len(chosen) == 6
    assert chosen[-1] == (*prompts[0], *[129] * DEEP) and answers[0] == [129] * DEEP
    assert answers[1] == [chosen[-2][-1]] * DEEP
    chosen, answers = audit_prompts(prompts, Model({}, ends_after=2), {END}, 10)
    assert answers[0] == [129] * 2 and chosen[-1] == (*prompts[0], 129, 129)
    assert audit_prompts([(1, 2)], Model({}), {END}, 10) == ([(1, 2), (1, 2, *[2] * DEEP)], [[2] * DEEP] * 2)
