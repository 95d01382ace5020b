"""In which order a process reads the rows of shards: shuffled, each row on one process, and from any place on.

A pass gives every row once, over all processes; after a pass the next one begins, in another order. Of the shards, in
an order drawn for the pass, each process takes every `processes`-th whole; of those left over, which are fewer than
processes, every `processes`-th row. Rows are read in blocks, and shuffled in each; so the place in the stream is that
where the block begins, and how many of its rows were given. To go on, the block is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice, takewhile

import numpy as np

from .shards import Row, Shards

MAX_EMPTY_PASSES = 100  # one after the other: by then there is nothing


@dataclass
class Part:
    """One process's part of a pass, and how far it is read."""

    number: int  # of the pass
    seed: int
    process: int
    processes: int
    block: int = 0  # blocks before the one in hand
    size: int | None = None  # of that block; None: as the options say
    taken: int = 0  # of its rows, in their shuffled order
    place: int = 0  # shards that were read
    row: int = 0  # of the next shard

    def shards(self, count: int) -> list[tuple[int, bool]]:
        """The shards to read, and whether this process has all their rows."""
        order = np.random.default_rng([self.seed, self.number]).permutation(count).tolist()
        whole = count - count % self.processes
        return [(shard, True) for shard in order[self.process : whole : self.processes]] + [
            (shard, False) for shard in order[whole:]
        ]

    def has(self, row: Row) -> bool:
        """Whether this process has this row of a shard that it shares; who has the first changes, for short shards."""
        return (row.row + row.shard + self.number) % self.processes == self.process


class StreamOrder:
    """The rows of one process without end, in an order that depends on the seed, the pass and the processes alone.

    Args:
        shards: Of the training split.
        process, processes: Which of how many.
        seed: Of the order.
        buffer: Rows that are held and shuffled; two such blocks are in memory, as they are stored.
        state: Of a `place` before; None: from the beginning.

    Raises:
        ValueError: (while it is read) a damaged shard, or no row for this process.
    """

    def __init__(
        self, shards: Shards, *, process: int, processes: int, seed: int, buffer: int, state: dict | None = None
    ):
        self.shards, self.process, self.processes, self.seed, self.buffer = shards, process, processes, seed, buffer
        state = state or {"parts": [], "next": 0}
        self.parts, self.next = [Part(**part) for part in state["parts"]], state["next"]
        self._reader: Iterator[Row] | None = None  # of the shard that the last block ended in
        self._closed = False

    def batches(self, size: int) -> Iterator[tuple[list[Row], dict]]:
        """Lists of `size` rows, and the state to go on from after each."""
        batch = []
        # The next block is read while this one is given.
        with ThreadPoolExecutor(1, thread_name_prefix="stream") as reader, closing(self):
            upcoming = reader.submit(self._block)
            while True:
                state, rows = upcoming.result()
                upcoming = reader.submit(self._block)
                part, *later = state["parts"]
                seeds = [part[name] for name in ("seed", "number", "process", "processes", "block")]
                shuffled = np.random.default_rng(seeds).permutation(len(rows)).tolist()
                for taken, index in enumerate(shuffled[part["taken"] :], part["taken"] + 1):
                    batch.append(rows[index])
                    rows[index] = None  # gives its memory back
                    if len(batch) == size:
                        yield batch, {**state, "parts": [{**part, "taken": taken}, *later]}
                        batch = []

    def close(self) -> None:
        """Ends a block that is being read, for which nobody waits any more."""
        self._closed = True

    def _block(self) -> tuple[dict, list[Row | None]]:
        """The state where a block begins, and its rows."""
        for _ in range(MAX_EMPTY_PASSES):
            if not self.parts:
                self.parts.append(Part(self.next, self.seed, self.process, self.processes))
                self.next += 1
            part = self.parts[0]
            part.size = part.size or self.buffer
            state = {"parts": [asdict(each) for each in self.parts], "next": self.next}
            rows, ended = self._read(part)
            part.block, part.size, part.taken = part.block + 1, None, 0
            if ended:
                self.parts.pop(0)
            if rows:
                return state, rows
        raise ValueError(f"{MAX_EMPTY_PASSES} passes of the stream gave no row for this process: give more data.")

    def _read(self, part: Part) -> tuple[list[Row], bool]:
        """The rows of a block of a part, which is then as far, and whether it has ended."""
        rows = []
        shards = part.shards(len(self.shards))
        while part.place < len(shards) and not self._closed:
            shard, whole = shards[part.place]
            reader = self._reader or self.shards.read(shard, part.row)
            self._reader = None
            held_out = self.shards.held_out.get(shard, 0)
            reading = takewhile(lambda _: not self._closed, reader)
            mine = (row for row in reading if row.row >= held_out and (whole or part.has(row)))
            rows += islice(mine, part.size - len(rows))
            if len(rows) == part.size:
                part.row, self._reader = rows[-1].row + 1, reader
                return rows, False
            part.place, part.row = part.place + 1, 0
        return rows, True


def one_pass(shards: Shards, process: int, processes: int) -> Iterator[Row]:
    """The rows of one process, as they are stored: each row is on one of them."""
    part = Part(0, 0, process, processes)
    for shard, whole in sorted(part.shards(len(shards))):
        yield from (row for row in shards.read(shard) if whole or part.has(row))


def divide_states(states: Sequence[dict], processes: int, process: int) -> dict:
    """The state of one of `processes`, to go on from those of a run on `len(states)` of them.

    On another number, what the old processes had left of the passes that they had begun is read to its end, by one of
    the new each. So every row still comes once in a pass, though some processes begin the next one earlier.
    """
    if len(states) == processes:
        return states[process]
    begun, mine = max(state["next"] for state in states), []
    for old in range(process, len(states), processes):
        parts, later = states[old]["parts"], range(states[old]["next"], begun)
        mine += [*parts, *(asdict(Part(number, parts[-1]["seed"], old, len(states))) for number in later)]
    return {"parts": sorted(mine, key=lambda part: part["number"]), "next": begun}
