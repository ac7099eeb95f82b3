"""The order of rows that pass through a mixing buffer: what live training and streamed datasets have in common.

The rows come in *fills*, each of about half of what the buffer holds. Window k of the stream serves, shuffled, a random half of
fill k and the half of fill k - 1 that window k - 1 left; after the last fill comes an empty one, whose window serves the rest.
So every row is served once an epoch, and a window is a function of the seed and two fills: a resumed run reads these two again
instead of finding the buffer in its checkpoint.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from sources.source import evenly_spaced


class Refill(NamedTuple):
    """What a reader put into one half of the buffer."""

    rows: int  # 0 after the last one of an epoch
    end: Any  # position of its stream after them, in JSON's types
    checksum: int = 0  # of the rows, to find out whether a resumed run reads the same ones


class Reader(Protocol):
    """What puts rows into the buffer."""

    def seek(self, start: Any) -> None:
        """Go on from `start`, which `read` once gave as an end; None is the beginning."""

    def read(self, number: int) -> Refill:
        """Put fill `number` of the epoch, the rows that come next, into half `number % 2` of the buffer."""

    def close(self) -> None:
        """As `Source.close`: all rows of an epoch have been served."""


class MixingBuffer:
    """Which slots of a buffer of two fills are served next; fill k lies in half k % 2. The reader holds the buffer itself.

    Args:
        reader: puts rows into the buffer.
        buffer_rows: slots of the buffer.
        flag: that names the data, for errors. contents: what runs out at the end of an epoch, for the message.
    """

    def __init__(self, reader: Reader, *, seed: int, buffer_rows: int, flag: str, contents: str):
        self.reader, self.seed, self.capacity = reader, seed, buffer_rows // 2
        self.flag, self.contents = flag, contents
        self.epoch, self.window = 0, None
        self.counts, self.checksums = [0, 0], [0, 0]  # of the fill in each half
        self.starts, self.end = [None, None], None  # position of the reader's stream before each fill and after the later one
        self.slots, self.served = np.empty(0, np.int64), 0  # of the window, in the order of serving, and how many are served
        self.opened: list[tuple[int, dict]] = []  # (first position, state_dict without `served`) of recent windows, ascending

    def take(self, position: int, count: int) -> np.ndarray:
        """[<= count] slots of the rows at `position` and after, fewer at the end of a window."""
        while self.served == len(self.slots):
            self.next_window(position)
        slots = self.slots[self.served : self.served + count]
        self.served += len(slots)
        return slots

    def state_dict(self, position: int) -> dict:
        """What `load_state_dict` needs to go on at a position in another process. Positions of later calls are not lower."""
        while len(self.opened) > 1 and self.opened[1][0] <= position:
            del self.opened[0]
        first, window = self.opened[0]
        return window | {"served": position - first}

    def load_state_dict(self, state: dict, position: int) -> None:
        """Read the two fills of a window again, and pass over the rows it has served before `position`."""
        self.epoch, window, self.end = state["epoch"], state["window"], state["start"]
        self.reader.seek(self.end)
        self.opened.clear()
        fills = range(max(0, window - 1), window + 1)
        for number in fills:
            self.fill(number)
        self.open_window(window, position - state["served"])
        self.served = state["served"]
        if any(self.checksums[n % 2] != state.get("checksums", self.checksums)[n % 2] for n in fills):
            raise ValueError(
                f"{self.flag}: gives other rows than when the run began; resume on the same data, or start anew with --config"
            )

    def first_rows(self, count: int) -> np.ndarray:
        """At most `count` evenly spaced slots of the first fill, ascending. Before any other is read."""
        if self.window is None:
            self.next_window(0)
        return evenly_spaced(count, self.counts[0])

    def next_window(self, position: int) -> None:
        number = 0 if self.window is None else self.window + 1
        if self.window is not None and not self.counts[self.window % 2]:  # that window served the last rows of the epoch
            number, self.end = 0, None
            self.epoch += 1
            tqdm.write(
                f"{self.contents} ran out after {position // self.epoch:,} rows: "
                f"epoch {self.epoch + 1} goes through them again, in another order"
            )
            self.reader.close()
            self.reader.seek(None)
        self.fill(number)
        self.open_window(number, position)

    def fill(self, number: int) -> None:
        half = number % 2
        self.starts[half] = self.end
        self.counts[half], self.end, self.checksums[half] = self.reader.read(number)

    def open_window(self, number: int, position: int) -> None:
        """Shuffle half of fill `number` and what is left of the one before; the first of these rows is served at `position`."""
        fresh, _ = self.halves(number)
        left = self.halves(number - 1)[1] if number else fresh[:0]
        self.slots = np.random.default_rng([self.seed, self.epoch, number, 1]).permutation(np.concatenate([fresh, left]))
        self.served, self.window = 0, number
        start = self.starts[(number - 1) % 2] if number else None  # of the earlier of its two fills
        state = {"epoch": self.epoch, "window": number, "start": start, "checksums": list(self.checksums)}
        self.opened.append((position, state))

    def halves(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots of the rows of a fill: those that its own window serves, and those that it leaves for the next."""
        half = number % 2
        slots = np.random.default_rng([self.seed, self.epoch, number, 0]).permutation(self.counts[half]) + half * self.capacity
        return slots[: len(slots) // 2], slots[len(slots) // 2 :]
