"""A stream of rows mixed through a buffer: what training live from two models and from streamed datasets have in common.

The rows come in *fills*, each of about half of what the buffer holds. Window k of the stream serves, shuffled, a random half of
fill k and the half of fill k - 1 that stayed behind; after the last fill comes an empty one, whose window serves the rest. So
every row is served once an epoch, and a window is a function of the seed and two fills: a resumed run reads these two again
instead of finding the buffer in its checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from tqdm import tqdm


class Windows:
    """The order in which rows leave the buffer. Beneath `live.LiveActivations` and `streamed.StreamedActivations`.

    These have
        buffer_rows: places in the buffer, two fills of them; fill k lies in half k % 2.
        what: what runs out at the end of an epoch, for the message.
        seek(start): lets the stream go on from `start`, which `read` once gave as an end; None is the beginning.
        read(number) -> (rows, end): puts the fill that comes next into its half. How many rows it has, 0 after the last
            one, and where the stream then stands: anything that JSON can hold.
        end_epoch(): called when all rows have been served.
    """

    def begin(self, seed: int, buffer_rows: int) -> None:
        """Stand before the first window."""
        self.seed, self.capacity = seed, buffer_rows // 2
        self.epoch, self.window, self.counts = 0, None, [0, 0]  # counts: the rows of each fill
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

    def standing(self, position: int) -> dict:
        """What `go_to` needs to go on at a position, in another process. Not of one before that of an earlier call."""
        now = max(i for i, (first, _) in enumerate(self.opened) if first <= position)
        del self.opened[:now]
        first, window = self.opened[0]
        return window | {"served": position - first}

    def go_to(self, standing: dict, position: int) -> None:
        """Read the two fills of a window again, and pass over the rows it has served before `position`."""
        self.epoch, window = standing["epoch"], standing["window"]
        self.end = standing["start"]
        self.seek(self.end)
        self.opened.clear()
        for number in range(max(0, window - 1), window + 1):
            self.fill(number)
        self.open_window(window, position - standing["served"])
        self.served = standing["served"]

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
            self.end_epoch()
            self.seek(None)
        self.fill(number)
        self.open_window(number, position)

    def fill(self, number: int) -> None:
        half = number % 2
        self.starts[half] = self.end
        self.counts[half], self.end = self.read(number)

    def open_window(self, number: int, position: int) -> None:
        """Shuffle half of fill `number` and what is left of the one before; the first of these rows stands at `position`."""
        fresh, _ = self.halves(number)
        stayed = self.halves(number - 1)[1] if number else fresh[:0]
        self.places = np.random.default_rng([self.seed, self.epoch, number, 1]).permutation(np.concatenate([fresh, stayed]))
        self.served, self.window = 0, number
        start = self.starts[(number - 1) % 2] if number else None  # of the earlier of its two fills
        self.opened.append((position, {"epoch": self.epoch, "window": number, "start": start}))

    def halves(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in the buffer of the rows of a fill: those that its own window serves, and those that stay for the next."""
        half = number % 2
        places = np.random.default_rng([self.seed, self.epoch, number, 0]).permutation(self.counts[half]) + half * self.capacity
        return places[: len(places) // 2], places[len(places) // 2 :]


def host_memory() -> int:
    """Bytes of host memory that are free or can be freed, within the limits of a container."""
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *left_in_containers()])


def left_in_containers(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left under each memory limit of this process's control groups, version 1 or 2. Their file caches count as free."""
    left = []
    for line in Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []:
        _, kind, path = line.split(":", 2)
        if kind in ("", "memory"):
            names, total = ("memory.max", "memory.current"), ""
            if kind:
                names, total = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
            for folder in (root / kind / path.lstrip("/"), *(root / kind / path.lstrip("/")).parents):
                try:
                    limit, used = (int((folder / name).read_text()) for name in names)
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    left.append(limit - used + int(stat[f"{total}active_file"]) + int(stat[f"{total}inactive_file"]))
                except (OSError, ValueError, KeyError):  # no such folder here, or "max": no limit
                    continue
    return left
