"""Who gets which tokens in a step: order, budgets, cuts of prompts, preemption, ends in every state. No model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.cache.ledger import Ledger
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence, State
from hasten.errors import ArgumentError


class Desk:
    """A scheduler and a model that answers at once: every sequence wants so many new tokens."""

    def __init__(self, num_pages=16, page_size=4, budget=8, seats=4, windows=(None,)):
        self.ledger = Ledger(windows, [num_pages] * len(windows), page_size)
        self.scheduler = Scheduler(self.ledger, max_batch_tokens=budget, max_running=seats)
        self.wanted, self.computed, self.count, self.random = {}, {}, 0, random.Random(0)

    def add(self, num_prompt, num_new=4, **options):
        self.count += 1
        options = {"most": num_prompt + num_new - 1, **options}
        one = Sequence(tokens=[0] * num_prompt, holding=self.ledger.open(), arrival=(self.count, 0), **options)
        self.wanted[one], self.computed[one] = num_prompt + num_new, 0
        self.scheduler.add(one)
        return one

    def step(self):
        """[(arrival, start, count)], as scheduled; tokens come, and who has all leaves."""
        step = self.scheduler.schedule()
        for one in step.preempted:
            self.computed[one] = 0
        assert sum(chunk.count for chunk in step.chunks) + step.budget == self.scheduler.max_batch_tokens
        assert step.budget >= 0 and len(self.scheduler.running) <= self.scheduler.max_running
        for chunk in step.chunks:
            one = chunk.sequence
            assert chunk.start == self.computed[one] and chunk.count > 0 and one.state is State.RUNNING
            self.computed[one] += chunk.count
            if chunk.is_last:
                num_right = self.random.randint(0, chunk.num_draft)
                self.computed[one] -= chunk.num_draft - num_right
                one.holding.truncate(self.computed[one])
                one.tokens += [0] * (num_right + 1)
                assert one.num_tokens <= self.wanted[one], "a draft beyond the last token"
                if one.num_tokens == self.wanted[one]:
                    self.scheduler.finish(one)
        self.check()
        return [(chunk.sequence.arrival[0], chunk.start, chunk.count) for chunk in step.chunks]

    def check(self):
        self.ledger.check_integrity([one.holding for one in self.scheduler.sequences])
        for queue in (self.scheduler.waiting, self.scheduler.running):
            assert queue == sorted(queue, key=lambda one: one.arrival)

    def run(self, most=500):
        steps = []
        while not self.scheduler.is_idle:
            steps.append(self.step())
            assert len(steps) < most, "no end"
        assert self.ledger.num_free == tuple(pool.num_pages for pool in self.ledger.pools)
        return steps


def test_a_prompt_is_cut_where_the_budget_ends_and_decoding_goes_on_beside_it():
    desk = Desk(budget=8)
    desk.add(3, 6)
    assert desk.step() == [(1, 0, 3)]
    desk.add(20, 1)
    assert desk.step() == [(1, 3, 1), (2, 0, 7)]
    assert desk.step() == [(1, 4, 1), (2, 7, 7)]
    desk.add(9, 1)
    assert desk.step() == [(1, 5, 1), (3, 0, 1), (2, 14, 6)]  # single tokens first, in the forward


def test_decoding_comes_before_an_earlier_prompt():
    desk = Desk(budget=8, num_pages=40)
    first = desk.add(30, 1)
    desk.step()
    desk.add(2, 5)
    first.tokens += [0] * 4  # longer than the budget for steps to come
    desk.scheduler.max_batch_tokens = 40
    desk.step()
    desk.scheduler.max_batch_tokens = 8
    first.tokens += [0] * 40
    assert desk.step()[0][0] == 2


def test_who_comes_first_is_served_first_and_nobody_overtakes():
    desk = Desk(num_pages=8, budget=32, seats=4)
    desk.add(16, 8)  # 6 pages in the end
    desk.step()
    long, short = desk.add(20, 2), desk.add(1, 1)
    desk.step()
    assert long.state is short.state is State.WAITING
    desk.run()


def test_seats_bound_what_runs():
    desk = Desk(seats=2)
    for _ in range(4):
        desk.add(2, 3)
    desk.step()
    assert len(desk.scheduler.running) == 2
    forked = Desk(seats=3)
    forked.add(2, 3)
    waits = forked.add(2, 3, seats=3)
    forked.step()
    assert waits.state is State.WAITING
    forked.run()


def test_the_last_to_come_is_preempted_and_computes_again():
    desk = Desk(num_pages=4, page_size=2, budget=8, seats=2)
    first, second = desk.add(2, 6), desk.add(1, 6)
    desk.step()
    assert second.state is State.RUNNING
    steps = desk.run()
    assert second.num_preemptions > 0 and first.num_preemptions == 0
    assert desk.scheduler.num_preemptions == second.num_preemptions
    assert any(arrival == 2 and start == 0 and count > 1 for step in steps for arrival, start, count in step)


def test_what_a_step_planned_for_a_victim_is_taken_back():
    desk = Desk(num_pages=3, page_size=2, budget=8, seats=3)
    one, two = desk.add(2, 4), desk.add(1, 2)
    desk.step()
    desk.scheduler.ledger.pools[0].allocate(1)  # nothing is free
    one.tokens += [0, 0, 0]  # a prompt again: goes after the decoding one, and takes its page
    step = desk.scheduler.schedule()
    assert step.preempted[0] is two and all(chunk.sequence is not two for chunk in step.chunks)


@pytest.mark.parametrize("state", [State.WAITING, State.RUNNING, State.FINISHED])
def test_a_sequence_can_be_let_go_in_every_state(state):
    desk = Desk()
    one = desk.add(20, 3)
    if state is not State.WAITING:
        desk.step()
    if state is State.FINISHED:
        desk.run()
    assert one.state is state
    desk.scheduler.finish(one)
    desk.scheduler.finish(one)
    desk.check()
    assert desk.scheduler.is_idle and desk.ledger.num_free == (16,)


def test_a_preempted_sequence_can_be_let_go():
    desk = Desk(num_pages=4, page_size=2, seats=2)
    desk.add(2, 6), desk.add(1, 6)
    while not desk.scheduler.num_preemptions:
        desk.step()
    desk.scheduler.finish(desk.scheduler.waiting[0])
    desk.run()


def test_deadlines_are_found_in_every_state():
    desk = Desk(seats=1)
    running, waiting = desk.add(2, deadline_s=5.0), desk.add(2, deadline_s=4.0)
    desk.add(2)
    desk.step()
    assert desk.scheduler.expired(3.9) == [] and desk.scheduler.expired(4.0) == [waiting]
    assert desk.scheduler.expired(9.0) == [running, waiting]


def test_a_fork_shares_pages_until_it_writes():
    desk = Desk(page_size=4)
    one = desk.add(6, 4, seats=2)
    desk.step()
    two = desk.scheduler.fork(one, (1, 1))
    desk.wanted[two], desk.computed[two] = 10, 6
    assert one.seats == 1 and desk.ledger.num_free == (14,)
    step = desk.scheduler.schedule()
    assert [len(chunk.copies[0]) for chunk in step.chunks] == [1, 0]  # the second is alone with its page by then
    desk.computed[one] = desk.computed[two] = 7
    one.tokens.append(0), two.tokens.append(0)
    desk.run()


def test_what_can_never_be_served_is_known():
    desk = Desk(num_pages=4, page_size=4)
    assert desk.scheduler.fits(16) and not desk.scheduler.fits(17)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seats": 9, "budget": 8}, "max_batch_tokens: expected at least max_running, 9, .* got 8"),
        ({"seats": 0}, "max_running: expected at least 1, got 0"),
        ({"seats": 0, "budget": 0}, "max_batch_tokens: expected at least 1, got 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        Desk(**options)


def test_a_draft_takes_what_is_left_of_the_budget_and_of_the_pages():
    desk = Desk(budget=8, num_pages=40)
    one = desk.add(3, 20)
    desk.step()
    one.draft = [0] * 5
    other = desk.add(4, 20)
    assert sorted(desk.step()) == [(1, 3, 4), (2, 0, 4)]  # a token of each that decodes, the prompt, then the draft
    one.draft = []
    other.draft = [0] * 9
    assert [count for number, _, count in desk.step() if number == 2] == [7]
    full = Desk(num_pages=1, page_size=4)
    one = full.add(1, 3)
    full.step()
    one.draft, one.most = [0] * 9, 20
    (chunk,) = full.scheduler.schedule().chunks
    assert (chunk.start, chunk.count) == (1, 3) and full.scheduler.num_preemptions == 0


def test_a_draft_ends_before_the_last_token():
    desk = Desk(budget=30)
    one = desk.add(3, 4)
    desk.step()
    one.draft = [0] * 9
    (chunk,) = desk.scheduler.schedule().chunks
    assert (chunk.start, chunk.count, chunk.num_draft) == (3, 3, 2)  # the fourth new token is never computed


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from([(None,), (None, 3), (5,)]))
def test_any_traffic_comes_to_its_end(seed, windows):
    draw = random.Random(seed)
    size, seats = draw.choice([1, 2, 4]), draw.randint(1, 5)
    desk = Desk(draw.randint(5, 20), size, draw.randint(seats, 12), seats, windows)
    for _ in range(60):
        event = draw.random()
        if event < 0.3:
            num_prompt, num_new = draw.randint(1, 12), draw.randint(1, 8)
            if desk.scheduler.fits(num_prompt + num_new - 1):
                desk.add(num_prompt, num_new)
        elif event < 0.4 and desk.scheduler.sequences:
            desk.scheduler.finish(draw.choice(desk.scheduler.sequences))
        elif event < 0.5:
            ready = [one for one in desk.scheduler.running if one.num_left == 1]
            if ready and len(desk.scheduler.running) < seats:
                one = draw.choice(ready)
                desk.count += 1
                two = desk.scheduler.fork(one, (one.arrival[0], desk.count))
                desk.wanted[two], desk.computed[two] = desk.wanted[one], desk.computed[one]
        else:
            for one in desk.scheduler.running:
                one.draft = [0] * draw.choice([0, 0, 1, 5])
            desk.step()
        desk.check()
    desk.run()


class Groups(Desk):
    """A desk where some sequences come in groups, none of which goes on without the others: beams."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.members, self.waits = {}, set()

    def add_group(self, num_prompt, num_new, size):
        first = self.add(num_prompt, num_new, seats=size, is_of_group=True)
        self.members[first.arrival[0]] = (size, [first])
        return first

    def step(self):
        step = self.scheduler.schedule()
        for one in step.preempted:
            group = self.members.get(one.arrival[0], (1, [one]))[1]
            assert all(other.state is not State.RUNNING for other in group), "a part of a group goes on"
        for chunk in step.chunks:
            if chunk.is_last and chunk.sequence.is_of_group:
                self.waits.add(chunk.sequence)
                self.advance(chunk.sequence.arrival[0])
            elif chunk.is_last:
                chunk.sequence.tokens.append(0)
                if chunk.sequence.num_tokens == self.wanted[chunk.sequence]:
                    self.scheduler.finish(chunk.sequence)
        self.check()
        return step.chunks

    def advance(self, number):
        """As beams.py does: once all are known, fork if need be, and let each be a fork of one of them."""
        size, group = self.members[number]
        if not all(one in self.waits for one in group):
            return
        self.waits -= set(group)
        if group[0].num_tokens + 1 == self.wanted[group[0]]:
            for one in group:
                self.scheduler.finish(one)
            return
        group += [self.scheduler.fork(group[0], (number, index)) for index in range(len(group), size)]
        before = [(one.holding, one.tokens) for one in group]
        for one in group:
            holding, tokens = self.random.choice(before)
            one.holding, one.tokens = holding.fork(), [*tokens, 0]
        for holding, _ in before:
            holding.free()


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from([(None,), (None, 3), (5,)]))
def test_groups_among_others_come_to_their_end(seed, windows):
    draw = random.Random(seed)
    size, seats = draw.choice([1, 2, 4]), draw.randint(1, 6)
    desk = Groups(draw.randint(8, 40), size, draw.randint(seats, 12), seats, windows)
    desk.random = draw
    for _ in range(60):
        event = draw.random()
        num_prompt, num_new, of = draw.randint(1, 12), draw.randint(1, 8), draw.randint(2, 4)
        if event < 0.15 and desk.scheduler.fits(num_prompt + num_new - 1):
            desk.add(num_prompt, num_new)
        elif event < 0.4 and of <= seats and desk.scheduler.fits(num_prompt + num_new - 1, of):
            desk.add_group(num_prompt, num_new, of)
        elif event < 0.45 and desk.scheduler.sequences:
            number = draw.choice(desk.scheduler.sequences).arrival[0]
            for one in [one for one in desk.scheduler.sequences if one.arrival[0] == number]:
                desk.scheduler.finish(one)
        else:
            desk.step()
        desk.check()
    desk.run()
