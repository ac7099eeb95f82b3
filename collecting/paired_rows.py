"""Text -> two models -> rows: what `collect.py` stores and `live.py` trains on, so that both get the same.

The order of use: `calibrate` and `held_out` on what lies `ahead`, then `training_rows`. Everything is a function of the texts,
the models and the seed, so that a restart gives the same rows again.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from collecting import language_model as lm
from collecting import text as texts
from run.machine import progress_bar

CALIBRATION_ROWS = 32_768  # rows that fix the outlier limit and the stored scale, before the first row is used
BUCKET = 8  # forward batches of unpacked texts that are sorted by length together, so that little is padding
HELD_OUT_STRETCH = 4  # one of so many sequences is held out, until there are enough
REASONS = ("padding", "first_positions", "norm", "non_finite", "beyond_num_tokens")  # why a position gives no row


class Sequence(NamedTuple):
    index: int  # number of the sequence in the texts
    source: int  # number of the --text it comes from
    tokens: np.ndarray  # [<= seq_len] int32


class Rows(NamedTuple):
    """The rows that one forward batch gives: filtered, scaled and in the type they are stored in."""

    base: Tensor  # [rows, d_model], on the base model's device
    ft: Tensor  # [rows, d_model], on the fine-tuned model's device
    columns: np.ndarray  # [3, rows] int32: sequence, position, token
    passed: list[Sequence]  # the sequences that the texts gave meanwhile, held-out ones included
    left_out: Counter  # positions without a row, by reason


class PairedModels:
    """Two models at one hook over one stream of texts.

    Args: as the flags of `config.ModelFlags`, and
        batch_size: sequences per forward pass.
        dtype: float16 or float32, of the rows.
        devices: of the base and of the fine-tuned model, as `usable_device` gives them.
        seed: decides which sequences are held out.
        live: the flags that errors name are those of train.py.
        known: the `fingerprints` that a run or collection began with, which goes on; commits on the Hub are taken from them.

    ValueError, naming the flag, for what cannot be opened or paired, or is no longer what it was.
    """

    def __init__(
        self, *, base_model, ft_model, hook, ft_hook, text, text_column, chat_template, seq_len, pack, model_dtype, skip_first,
        max_norm_ratio, batch_size, dtype, devices, seed, live=False, base_revision=None, ft_revision=None, ft_adapter=None,
        known=None,
    ):  # fmt: skip
        self.seq_len, self.skip_first, self.max_norm_ratio, self.seed = seq_len, skip_first, max_norm_ratio, seed
        self.batch_size, self.dtype, self.live = batch_size, dtype, live
        self.drawn = drawn_together(batch_size, pack)
        self.ft_hook = ft_hook or hook
        self.batch_flag = "--model-batch-size" if live else "--batch-size"
        if seq_len < 2:
            raise ValueError(f"--seq-len {seq_len}: must be at least 2")
        if batch_size < 1:
            raise ValueError(f"{self.batch_flag} {batch_size}: must be at least 1")
        if not 0 <= skip_first < seq_len:
            raise ValueError(f"--skip-first {skip_first}: must be at least 0 and below --seq-len {seq_len}")
        if not 1 < max_norm_ratio < float("inf"):  # which JSON cannot hold
            raise ValueError(f"--max-norm-ratio {max_norm_ratio:g}: must be above 1 and finite; 1e9 keeps rows of every norm")
        if not text:
            raise ValueError("--text is missing: give at least one source of text")
        if not ft_model:
            if not ft_adapter:
                raise ValueError(
                    "--ft-model is missing: give the fine-tuned model, or with --ft-adapter what it adds to the base"
                )
            ft_model, ft_revision = base_model, ft_revision or base_revision
        given = {"--base-model": base_model, "--ft-model": ft_model, "--ft-adapter": ft_adapter}
        here = {flag: Path(name).expanduser() for flag, name in given.items() if name and Path(name).expanduser().is_dir()}
        if known is not None:  # the commits that it began with, where there are newer ones
            base_revision = base_revision if "--base-model" in here else known.get("--base-model", base_revision)
            ft_revision = ft_revision if "--ft-model" in here else known.get("--ft-model", ft_revision)
        self.tokenizer = lm.load_paired_tokenizer(base_model, ft_model, base_revision, ft_revision, ft_adapter)
        self.open_texts = partial(
            texts.open_sources, text, self.tokenizer, seq_len, skip_first, pack, tuple(text_column), chat_template,
            {flag.removeprefix("--text "): commit for flag, commit in (known or {}).items()},
        )  # fmt: skip
        self.sources = self.open_texts()
        self.fingerprints = {flag: texts.fingerprint(lm.weight_files(folder)) for flag, folder in here.items()}
        self.fingerprints |= {f"--text {source.name}": source.fingerprint() for source in self.sources}
        self.refuse_other_content(known)  # before the models are loaded
        self.models = [lm.load_model(base_model, model_dtype, devices[0], "--base-model", base_revision)]
        self.models += [lm.load_model(ft_model, model_dtype, devices[1], "--ft-model", ft_revision, ft_adapter)]
        flags = ("--hook", "--ft-hook" if ft_hook else "--hook")
        self.hooks = [lm.parse_hook(m, h, f) for m, h, f in zip(self.models, (hook, ft_hook or hook), flags, strict=True)]
        self.d_model, d_ft = (lm.probe_hook(m, h, f) for m, h, f in zip(self.models, self.hooks, flags, strict=True))
        if self.d_model != d_ft:
            raise ValueError(
                f"--hook: base activations have {self.d_model} values and fine-tuned ones {d_ft}; they cannot be paired"
            )
        for model, flag in zip(self.models, ("--base-model", "--ft-model"), strict=True):
            if seq_len > (lm.max_positions(model) or seq_len):
                raise ValueError(
                    f"--seq-len {seq_len}: {flag} was made for {lm.max_positions(model)} positions at most; lower it"
                )
        self.revisions = [lm.commit(base_model, base_revision), lm.commit(ft_model, ft_revision)]
        commits = (*self.revisions, ft_adapter and lm.commit(ft_adapter))
        self.fingerprints |= {flag: commit for flag, commit in zip(given, commits, strict=True) if commit}
        self.refuse_other_content(known)
        self.median = self.scale = None  # [2] each, float64: median norm and stored_scale
        self.held_out_until = 0  # index of the first sequence from which on none is held out
        self.stream: Iterator[Sequence] | None = None
        self.kept: dict[tuple[int, ...], lm.PairedRows] = {}  # forward passes of the calibration, by their sequences
        self.calibrating, self.kept_until = False, 0  # index of the last sequence that was calibrated on

    def refuse_other_content(self, known: dict | None) -> None:
        for flag, now in self.fingerprints.items():
            if known is not None and known.get(flag) != now:
                raise ValueError(
                    f"{flag}: has other content than when this {'run' if self.live else 'collection'} began; bring that back, "
                    f"or begin anew with another {'--run-name' if self.live else '--output'}"
                )

    # --- sequences

    def start(self, sequence: int = 0) -> None:
        """Go to the given sequence of the texts, which are read from their beginning."""
        if self.stream is not None:
            self.sources = self.open_texts()
        stream = (Sequence(i, *drawn) for i, drawn in enumerate(texts.mix(self.sources)))
        self.stream = itertools.islice(stream, sequence, None)

    def ahead(self) -> Iterator[Sequence]:
        """The sequences that come next, without taking them out of the stream."""
        self.stream, ahead = itertools.tee(self.stream)
        return ahead

    # --- rows

    def calibrate(self, n_rows: int, val_rows: int) -> None:
        """Fix the median norm and the scale from the first rows ahead.

        val_rows: what `held_out` will be asked for. The forward batches are those that it and `training_rows` need; their
        activations (about n_rows) are kept for them in host memory.
        """
        rows = 0
        for sequence in self.ahead():
            rows, self.kept_until = rows + len(sequence.tokens) - self.skip_first, sequence.index
            if rows >= n_rows:
                break
        found, self.calibrating = [], True
        with progress_bar("norms of the first rows", rows, delay=0) as bar:

            def note(acts: lm.PairedRows) -> None:
                found.append((acts.norms, acts.sequence, acts.position))
                bar.update(int((acts.sequence <= self.kept_until).sum()))

            for batch, acts, _ in self.held_out_batches(val_rows):
                note(acts)
                if batch[-1].index > self.kept_until:
                    self.held_out_until = sys.maxsize  # of the candidates among the first rows all are held out
                    break
            for drawn, _ in self.training_draws(self.ahead()):
                if not drawn or drawn[0].index > self.kept_until:
                    break
                for batch in self.by_length(drawn):
                    note(self.activations(batch))
        self.calibrating, self.held_out_until = False, 0
        norms, sequence, position = (np.concatenate(parts) for parts in zip(*found, strict=True))
        # in reading order; a candidate that was not held out came twice
        _, first = np.unique(sequence.astype(np.int64) * self.seq_len + position, return_index=True)
        self.median, self.scale = lm.calibrate(norms[first[:n_rows]], self.d_model, self.max_norm_ratio)

    def held_out(self, wanted: int, so_far: int = 0) -> Iterator[Rows]:
        """The rows of held-out sequences: with the `so_far` known ones `wanted`, as closely as whole sequences allow.

        One of every four sequences ahead, from `held_out_until` on; that index follows the sequences taken.
        """
        for batch, acts, taken in self.held_out_batches(wanted, so_far):
            yield self.rows(batch, acts, taken)

    def held_out_batches(self, wanted: int, so_far: int = 0) -> Iterator[tuple[list[Sequence], lm.PairedRows, int]]:
        """Forward batches, and of how many of its sequences the rows are held out."""
        candidates = (s for s in self.ahead() if s.index >= self.held_out_until and is_candidate(s.index, self.seed))
        enough = so_far >= wanted
        while not enough and (batch := list(itertools.islice(candidates, self.batch_size))):
            acts = self.activations(batch)
            median = lm.median_norm(acts.norms) if self.median is None else self.median  # an estimate, to calibrate with
            good, _ = lm.survivors(acts.norms, median, self.max_norm_ratio)
            for taken, sequence in enumerate(batch):
                rows = so_far + int(good[acts.sequence == sequence.index].sum())
                if enough := rows >= wanted:
                    taken += so_far == 0 or rows - wanted <= wanted - so_far  # with it, or without it
                    break
                so_far, taken = rows, taken + 1
            if taken:
                self.held_out_until = batch[taken - 1].index + 1
                yield batch, acts, taken

    def training_rows(self) -> Iterator[Rows]:
        """The rows of all sequences that are not held out, in reading order, `drawn` sequences at a time."""
        for drawn, passed in self.training_draws(self.stream):
            if self.kept and (not drawn or drawn[0].index > self.kept_until):
                self.kept.clear()  # more sequences were held out than the calibration had expected, so these batches never came
            parts = [self.rows(batch, self.activations(batch)) for batch in self.by_length(drawn)]
            if not parts:  # the texts ended with held-out sequences
                nothing = torch.empty(0, self.d_model)
                parts = [Rows(nothing, nothing, np.empty((3, 0), np.int32), [], Counter())]
            base, ft, columns, _, left_out = zip(*parts, strict=True)
            yield Rows(torch.cat(base), torch.cat(ft), np.concatenate(columns, axis=1), passed, sum(left_out, Counter()))

    def training_draws(self, stream: Iterator[Sequence]) -> Iterator[tuple[list[Sequence], list[Sequence]]]:
        """`drawn` sequences of the stream that are not held out, and all that the stream gave meanwhile."""
        drawn, passed = [], []
        for sequence in stream:
            passed.append(sequence)
            if sequence.index >= self.held_out_until or not is_candidate(sequence.index, self.seed):
                drawn.append(sequence)
            if len(drawn) == self.drawn:
                yield drawn, passed
                drawn, passed = [], []
        if passed:
            yield drawn, passed

    def by_length(self, drawn: list[Sequence]) -> list[list[Sequence]]:
        """Forward batches, the longest sequences first: those of similar length share one."""
        drawn = sorted(drawn, key=lambda s: -len(s.tokens))
        return [drawn[i : i + self.batch_size] for i in range(0, len(drawn), self.batch_size)]

    def activations(self, batch: list[Sequence]) -> lm.PairedRows:
        """Both models over a forward batch; what the calibration has kept is taken from there."""
        indices = tuple(s.index for s in batch)
        if indices in self.kept:
            acts = self.kept.pop(indices)
            base, ft = (x.to(model._module.device) for x, model in zip((acts.base, acts.ft), self.models, strict=True))
            return acts._replace(base=base, ft=ft)
        sequences = [s.tokens for s in batch]
        acts = lm.paired_activations(
            *self.models, *self.hooks, self.d_model, indices, sequences, self.skip_first, self.batch_flag
        )
        if self.calibrating:
            self.kept[indices] = acts._replace(base=acts.base.cpu(), ft=acts.ft.cpu())
        return acts

    def rows(self, batch: list[Sequence], acts: lm.PairedRows, taken: int | None = None) -> Rows:
        """The rows of the first `taken` sequences of a batch (None: all)."""
        lengths = np.array([len(s.tokens) for s in batch])  # [sequences]
        longest, taken = lengths.max(), len(batch) if taken is None else taken
        good, finite = lm.survivors(acts.norms, self.median, self.max_norm_ratio)
        ours = np.isin(acts.sequence, [s.index for s in batch[:taken]])  # [rows]
        keep = np.flatnonzero(good & ours)  # [kept]
        left_out = Counter(
            padding=int((longest - lengths[:taken]).sum()),
            first_positions=int(np.minimum(lengths[:taken], self.skip_first).sum()),
            norm=int((ours & finite & ~good).sum()),
            non_finite=int((ours & ~finite).sum()),
        )
        base, ft = (self.stored_values(x, keep, s) for x, s in zip((acts.base, acts.ft), self.scale, strict=True))
        columns = np.stack([acts.sequence, acts.position, acts.token])[:, keep]
        return Rows(base, ft, columns, [], left_out)

    def stored_values(self, x: Tensor, keep: np.ndarray, scale: float) -> Tensor:
        """Rows `keep` of the activations x [rows, d_model], scaled: [kept, d_model] float16 or float32."""
        values = x[torch.from_numpy(keep).to(x.device)].float() * float(scale)
        if self.dtype == "float16":
            values = values.half()
            if values.isinf().any():
                raise ValueError(
                    "--max-norm-ratio: an activation is too large for the float16 of the buffer; lower it" if self.live else
                    "--dtype float16: an activation is too large for it; give --dtype float32, or lower --max-norm-ratio"
                )  # fmt: skip
        return values


class Fill:
    """Rows of whole forward batches, gathered until they make a shard or a half of the live buffer.

    values: [capacity, 2, d_model] memory for them, on any device.
    """

    def __init__(self, values: Tensor):
        self.values = values
        self.columns = np.empty((3, len(values)), np.int32)  # sequence, position, token
        self.clear()

    def clear(self) -> None:
        self.n, self.passed, self.left_out = 0, [], Counter()

    def add(self, rows: Rows, most: int | None = None) -> int:
        """Take the rows in, at most `most`. Returns how many."""
        n = len(rows.base) if most is None else min(most, len(rows.base))
        place = slice(self.n, self.n + n)
        self.values[place, 0], self.values[place, 1] = rows.base[:n], rows.ft[:n]
        self.columns[:, place] = rows.columns[:, :n]
        self.n += n
        self.passed += rows.passed
        self.left_out.update(rows.left_out)
        self.left_out["beyond_num_tokens"] += len(rows.base) - n
        return n


def is_candidate(sequence: int, seed: int) -> bool:
    """Whether a sequence may be held out: one of every HELD_OUT_STRETCH in a row, at a random place among them."""
    stretch, place = divmod(sequence, HELD_OUT_STRETCH)
    return place == np.random.default_rng([seed, stretch]).integers(HELD_OUT_STRETCH)


def drawn_together(batch_size: int, pack: bool) -> int:
    """Sequences whose rows come at once. Packed ones are of one length, so there is nothing to sort."""
    return batch_size * (1 if pack else BUCKET)
