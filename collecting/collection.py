"""From draws to shards: which process makes which, and where --num-tokens cuts.

A shard is so many draws that they give `shard_rows` rows if none is left out for its norm, which the texts alone decide. So
every process, which reads all texts, knows which sequences each shard holds; of n processes, each makes every n-th shard. Only
where the last row falls depends on the rows before it: for that they exchange counts, once in a round of n shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from tqdm import tqdm

from collecting.paired_dataset import PairedDataset, facts_of
from collecting.paired_rows import PairedModels
from collecting.rows import Draw, GatheredRows, Sequence
from ops.shard import Shard
from run.machine import size_text


class Collection:
    """The datasets of one or several hooks, in the order of `models.hooks`, while they are written.

    num_tokens: rows of each dataset. shard_rows: of a shard. row_bytes: of all datasets. bar: shows the rows of the dataset
    that has the fewest.
    """

    def __init__(
        self, models: PairedModels, datasets: list[PairedDataset], *, num_tokens: int, shard_rows: int, row_bytes: int,
        shard: Shard, bar: tqdm,
    ):  # fmt: skip
        self.models, self.datasets, self.shard, self.bar = models, datasets, shard, bar
        self.num_tokens, self.shard_rows, self.row_bytes = num_tokens, shard_rows, row_bytes
        self.stored = [sum(dataset.progress["rows"].values()) for dataset in datasets]
        self.sequences = [dataset.progress["sequences"] for dataset in datasets]
        capacity, dtype = min(shard_rows, num_tokens) + models.drawn * models.seq_len, getattr(torch, models.dtype)
        shapes = [(capacity, len(models.models), hook.d_model) for hook in models.hooks]
        # one set is filled while the other is written
        self.buffers = itertools.cycle([[GatheredRows(torch.empty(shape, dtype=dtype)) for shape in shapes] for _ in range(2)])

    def write(self, split: str, draws: Iterable[Draw], front: list[Sequence]) -> None:
        """Write the rows of these draws, as many as are wanted, as shards of the split.

        front: the sequences from where the texts are up to the last held-out one.
        """
        begun = [dataset.progress["shards"][split] for dataset in self.datasets]  # a kill may fall between two hooks
        rounds, writing = self.rounds(iter(draws)), None
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            ahead = reader.submit(next, rounds, None)
            for first in itertools.count(min(begun), self.shard.size):
                done = [self.is_done(i, split) for i in range(len(begun))]
                if all(done) or not (plan := ahead.result()):
                    break
                ahead = reader.submit(next, rounds, None)
                mine, number = plan[self.shard.rank] if self.shard.rank < len(plan) else [], first + self.shard.rank
                rows = self.fill(mine, [i for i, n in enumerate(begun) if mine and number >= n and not done[i]])
                self.models.forget(itertools.chain.from_iterable(plan))
                passed, facts = self.settle(split, mine, rows, front)
                self.count(split, writing)
                writing = writer.submit(self.write_files, split, number, rows, passed), facts
            self.count(split, writing)

    def rounds(self, draws: Iterator[Draw]) -> Iterator[list[list[Draw]]]:
        """The draws of the next shards, one for each process, fewer at the end."""

        def shards() -> Iterator[list[Draw]]:
            shard: list[Draw] = []
            most = 0
            for draw in draws:
                shard.append(draw)
                most += draw.most_rows(self.models.skip_first)
                if most >= self.shard_rows:
                    yield shard
                    shard, most = [], 0
            if shard:
                yield shard

        made = shards()
        while plan := list(itertools.islice(made, self.shard.size)):
            yield plan

    def is_done(self, i: int, split: str) -> bool:
        """Whether a dataset has its rows, and tokens/ the held-out sequences that may come behind the last training row."""
        behind = split == "train" and self.sequences[i] < self.datasets[i].progress["held_out_until"]
        return self.stored[i] >= self.num_tokens and not behind

    def fill(self, draws: list[Draw], active: list[int]) -> dict[int, GatheredRows]:
        """The rows of this process's shard for each active dataset: until the dataset is full, if nobody else adds to it."""
        buffers = next(self.buffers)
        rows = {i: buffers[i] for i in active}
        for of_dataset in rows.values():
            of_dataset.clear()
        for draw in draws:
            wanted = [i for i in active if self.stored[i] + rows[i].n < self.num_tokens]
            if not wanted:
                break
            for i, found in zip(wanted, self.models.rows(draw, [self.models.hooks[i] for i in wanted]), strict=True):
                rows[i].add(found)
            self.show(min(self.stored[i] + self.shard.size * rows[i].n for i in active))
        return rows

    def settle(
        self, split: str, draws: list[Draw], rows: dict[int, GatheredRows], front: list[Sequence]
    ) -> tuple[dict[int, list[Sequence]], list[dict]]:
        """Cut the rows of this round where --num-tokens ends; what lies behind that is dropped from `rows`.

        Returns the sequences that go with this process's shard, and the `facts_of` every process's shard; both by dataset.
        """
        before = self.shard.gather_objects({i: of_dataset.n for i, of_dataset in rows.items()})[: self.shard.rank]
        passed, facts = {}, {}
        for i in list(rows):
            earlier = [counts[i] for counts in before if i in counts]
            left = self.num_tokens - self.stored[i] - sum(earlier)
            if earlier and left <= 0:
                del rows[i]
                continue
            rows[i].cut(max(0, left))
            used, until = len(rows[i].draws), self.datasets[i].progress["held_out_until"]
            if split == "validation":
                until, passed[i] = draws[used - 1].batches[-1][-1].index + 1, []
            else:
                after = draws[used].passed[0].index if used < len(draws) else draws[-1].passed[-1].index + 1
                behind = [s for s in front if after <= s.index < until] if rows[i].n == left or left <= 0 else []
                passed[i] = rows[i].passed + behind
            facts[i] = facts_of(rows[i], passed[i], until)
        everyone = self.shard.gather_objects(facts)
        for of_shard in everyone:
            for i, found in of_shard.items():
                self.stored[i] += found["rows"]
                self.sequences[i] += found["sequences"]
        self.show(min(self.stored))
        return passed, everyone

    def write_files(self, split: str, number: int, rows: dict[int, GatheredRows], passed: dict[int, list[Sequence]]) -> None:
        for i, of_dataset in rows.items():
            self.datasets[i].write_files(split, number, of_dataset, passed[i])

    def count(self, split: str, writing: tuple[Future, list[dict]] | None) -> None:
        """Wait until the shards of a round are on the disk, and count them."""
        if writing is None:
            return
        files, everyone = writing
        with self.shard.together():
            files.result()  # raises what went wrong with it
        for i, dataset in enumerate(self.datasets):
            if found := [facts[i] for facts in everyone if i in facts]:
                dataset.count(split, found)
                dataset.save_progress()

    def show(self, stored: int) -> None:
        self.bar.set_postfix_str(size_text(stored * self.row_bytes), refresh=False)
        self.bar.update(max(0, min(stored, self.num_tokens) - self.bar.n))
