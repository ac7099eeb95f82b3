"""A stream of rows mixed through a buffer: what training live from two models and from streamed datasets have in common.

The rows come in *fills*, each of about half of what the buffer holds. Window k of the stream serves, shuffled, a random half of
fill k and the half of fill k - 1 that stayed behind; after the last fill comes an empty one, whose window serves the rest. So
every row is served once an epoch, and a window is a function of the seed and two fills: a resumed run reads these two again
instead of finding the buffer in its checkpoint.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm


class Refill(NamedTuple):
    """What a reader put into one half of the buffer."""

    rows: int  # 0 after the last one of an epoch
    end: Any  # where its stream then stands, in JSON's types
    checksum: int = 0  # of the rows, to know them again


class Reader(Protocol):
    """What fills the buffer of `Windows`."""

    def seek(self, start: Any) -> None:
        """Go on from `start`, which `read` once gave as an end; None is the beginning."""

    def read(self, number: int) -> Refill:
        """Put fill `number` of the epoch, the rows that come next, into half `number % 2` of the buffer."""

    def end_epoch(self) -> None:
        """All rows have been served."""


class Windows:
    """The order in which rows leave a buffer of two fills; fill k lies in half k % 2.

    Args:
        reader: fills it.
        buffer_rows: places in the buffer.
        flag: what names the data. what: what runs out at the end of an epoch.
    """

    def __init__(self, reader: Reader, seed: int, buffer_rows: int, flag: str, what: str):
        self.reader, self.seed, self.capacity, self.what = reader, seed, buffer_rows // 2, what
        self.flag = flag
        self.epoch, self.window = 0, None
        self.counts, self.checksums = [0, 0], [0, 0]  # of each fill
        self.starts, self.end = [None, None], None  # where in the stream each fill begins, and where the later one ends
        self.places, self.served = np.empty(0, np.int64), 0  # of the window: places in the buffer, how many are used
        self.opened: list[tuple[int, dict]] = []  # (first position of a window, what takes the stream back to it), ascending

    def take(self, position: int, count: int) -> np.ndarray:
        """[<= count] the places in the buffer of the rows at `position` and after, fewer at the end of a window."""
        while self.served == len(self.places):
            self.next_window(position)
        places = self.places[self.served : self.served + count]
        self.served += len(places)
        return places

    def state_dict(self, position: int) -> dict:
        """What `load_state_dict` needs to go on at a position in another process. Positions of later calls are not lower."""
        now = max(i for i, (first, _) in enumerate(self.opened) if first <= position)
        del self.opened[:now]
        first, window = self.opened[0]
        return window | {"served": position - first}

    def load_state_dict(self, state: dict, position: int) -> None:
        """Read the two fills of a window again, and pass over the rows it has served before `position`."""
        self.epoch, window = state["epoch"], state["window"]
        self.end = state["start"]
        self.reader.seek(self.end)
        self.opened.clear()
        fills = range(max(0, window - 1), window + 1)
        for number in fills:
            self.fill(number)
        self.open_window(window, position - state["served"])
        self.served = state["served"]
        if any(self.checksums[n % 2] != state.get("checksums", self.checksums)[n % 2] for n in fills):
            raise ValueError(
                f"{self.flag}: gives other rows than when the run began; resume on the same data, or start a new run with "
                "--config"
            )

    def first_rows(self, count: int) -> np.ndarray:
        """At most `count` evenly spaced places of the first fill, ascending. Before any other is read."""
        if self.window is None:
            self.next_window(0)
        return np.unique(np.linspace(0, self.counts[0] - 1, min(count, self.counts[0])).astype(np.int64))

    def next_window(self, position: int) -> None:
        if self.window is None:
            number = 0
        elif self.counts[self.window % 2]:
            number = self.window + 1
        else:  # that window served the rest
            number, self.end = 0, None
            self.epoch += 1
            tqdm.write(
                f"{self.what} ran out after {position // self.epoch:,} rows: "
                f"epoch {self.epoch + 1} goes through them again, in another order"
            )
            self.reader.end_epoch()
            self.reader.seek(None)
        self.fill(number)
        self.open_window(number, position)

    def fill(self, number: int) -> None:
        half = number % 2
        self.starts[half] = self.end
        self.counts[half], self.end, self.checksums[half] = self.reader.read(number)

    def open_window(self, number: int, position: int) -> None:
        """Shuffle half of fill `number` and what is left of the one before; the first of these rows stands at `position`."""
        fresh, _ = self.halves(number)
        stayed = self.halves(number - 1)[1] if number else fresh[:0]
        self.places = np.random.default_rng([self.seed, self.epoch, number, 1]).permutation(np.concatenate([fresh, stayed]))
        self.served, self.window = 0, number
        start = self.starts[(number - 1) % 2] if number else None  # of the earlier of its two fills
        state = {"epoch": self.epoch, "window": number, "start": start, "checksums": list(self.checksums)}
        self.opened.append((position, state))

    def halves(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in the buffer of the rows of a fill: those that its own window serves, and those that stay for the next."""
        half = number % 2
        places = np.random.default_rng([self.seed, self.epoch, number, 0]).permutation(self.counts[half]) + half * self.capacity
        return places[: len(places) // 2], places[len(places) // 2 :]
