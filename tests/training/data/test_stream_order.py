"""Every row once a pass, over any number of processes; from any place on the same rows follow."""

import json
import time
from collections import Counter
from dataclasses import asdict
from itertools import count, islice

import pytest

from training.data.shards import Row
from training.data.stream_order import Part, StreamOrder, divide_states


class Lists:
    """Shards of numbers, in place of files."""

    def __init__(self, sizes, held_out=()):
        self.sizes, self.held_out = sizes, dict(held_out)

    def __len__(self):
        return len(self.sizes)

    def read(self, shard, row=0):
        return (Row(shard, number, {}) for number in range(row, self.sizes[shard]))


def of_pass(batches, number):
    """The rows of a pass, from batches of one row."""
    rows = []
    for (row,), state in batches:
        of_row = state["parts"][0]["number"]
        if of_row > number:
            return rows
        if of_row == number:
            rows.append((row.shard, row.row))


def order(shards, process=0, processes=1, **options):
    return StreamOrder(shards, process=process, processes=processes, **{"seed": 3, "buffer": 4, **options})


SIZES = [[5], [0, 3], [7, 1, 4], [2, 9, 0, 6, 3, 3, 8]]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_row_is_on_one_process_in_each_pass(sizes, processes):
    shards = Lists(sizes)
    expected = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    for number in (0, 1):
        parts = [of_pass(order(shards, process, processes).batches(1), number) for process in range(processes)]
        assert sorted(row for part in parts for row in part) == expected
        if len(sizes) < processes:  # rows of shared shards are dealt out
            assert max(map(len, parts)) - min(map(len, parts)) <= len(sizes)


def test_passes_and_seeds_differ_and_blocks_are_shuffled():
    shards = Lists([20, 20, 20])
    first, again, other = (of_pass(order(shards, seed=seed).batches(1), 0) for seed in (3, 3, 4))
    assert first == again != other and sorted(first) == sorted(other)
    assert of_pass(order(shards).batches(1), 1) != first
    assert first != sorted(first) and any(first[i : i + 4] != sorted(first[i : i + 4]) for i in range(0, 60, 4))
    plain = of_pass(order(shards, buffer=1).batches(1), 0)
    assert [row for _, row in plain] == [*range(20)] * 3


@pytest.mark.parametrize("processes", [1, 2])
def test_a_shard_of_many_blocks_is_opened_once_a_pass(processes):
    """Whoever opens it again reads all that stands before, so that a large shard would be read many times."""
    shards, opened = Lists([40, 7, 30]), []
    plain = shards.read
    shards.read = lambda shard, *more: opened.append(shard) or plain(shard, *more)
    of_pass(order(shards, 0, processes).batches(1), 1)
    assert max(Counter(opened).values()) <= 3, "of two passes, and of the begin of the third"


def test_who_closes_it_does_not_wait_for_the_next_block():
    shards, read = Lists([3000]), []
    plain = shards.read
    shards.read = lambda *place: (read.append(row) or time.sleep(0.001) or row for row in plain(*place))
    state = {"parts": [asdict(Part(0, 3, 0, 1, size=2))], "next": 1}
    batches = order(shards, buffer=3000, state=state).batches(2)
    next(batches)
    batches.close()
    assert len(read) < 3000


def test_rows_held_out_are_left_out():
    shards = Lists([5, 4, 3], {0: 2, 2: 3})
    assert sorted(of_pass(order(shards).batches(1), 0)) == [(0, 2), (0, 3), (0, 4), *((1, row) for row in range(4))]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_same_rows_follow_from_every_place(processes):
    shards = Lists([7, 1, 4, 5])
    for process in range(processes):
        batches = list(islice(order(shards, process, processes).batches(3), 25))
        for place in range(20):
            state = json.loads(json.dumps(batches[place][1]))
            rest = order(shards, process, processes, state=state).batches(3)
            assert [rows for rows, _ in islice(rest, 4)] == [rows for rows, _ in batches[place + 1 : place + 5]]


def test_another_buffer_seed_and_batch_go_on_where_it_was():
    shards = Lists([7, 1, 4, 5])
    batches = order(shards).batches(3)
    seen = [rows for rows, _ in islice(batches, 2)]
    _, state = next(batches)
    given = [(row.shard, row.row) for rows in seen for row in rows]
    rest = of_pass(order(shards, state=state, buffer=9, seed=8).batches(1), 0)
    assert len(rest) == 17 - 9 and not set(rest) & set(given)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (3, 2), (2, 5)])
def test_on_another_number_of_processes_each_row_still_comes_once_a_pass(old, new):
    shards = Lists([9, 2, 5, 4, 1])
    seen, states = Counter(), []
    for process, steps in zip(range(old), (17, 5, 11), strict=False):  # not side by side: some begin the next pass
        for (row,), state in islice(order(shards, process, old).batches(1), steps):
            seen[state["parts"][0]["number"], row.shard, row.row] += 1
        states.append(json.loads(json.dumps(state)))
    for process in range(new):
        begin = divide_states(states, new, process)
        for (row,), state in order(shards, process, new, state=begin).batches(1):
            if (number := state["parts"][0]["number"]) > 5:
                break
            seen[number, row.shard, row.row] += 1
    every = {(number, *row) for number in range(6) for row in of_pass(order(shards).batches(1), 0)}
    assert seen == Counter(every)


def test_no_rows_end_it_and_few_reach_every_process():
    with pytest.raises(ValueError, match="no row for this process"):
        next(order(Lists([0, 0])).batches(1))
    for process in range(3):
        assert next(order(Lists([1]), process, 3).batches(2))


def test_a_damaged_shard_is_told_where_it_is_reached():
    class Broken(Lists):
        def read(self, shard, row=0):
            if shard == 1:
                raise ValueError("b.tar is not a whole tar file")
            return super().read(shard, row)

    batches = order(Broken([2, 2, 2]), buffer=1).batches(1)
    with pytest.raises(ValueError, match=r"b\.tar is not a whole"):
        for _, _ in zip(batches, count(), strict=False):
            pass
