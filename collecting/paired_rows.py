"""Text -> two models -> rows: what `collect.py` stores and `live.py` trains on, so that both get the same.

Use: `start`, then `calibrate` and `held_out`, which read the stream without moving it, then `training_rows`. Everything is a
function of the texts, the models and the seed, so that a restart gives the same rows again.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
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
    passed: list[Sequence]  # sequences read from the texts to get these rows, held-out ones included
    left_out: Counter  # positions without a row, by reason


@dataclass(kw_only=True, eq=False)
class PairedModels:
    """Two models at one hook over one stream of texts.

    The first settings are the flags of `config.ModelFlags`, which explains them. ValueError, naming the flag, for what cannot
    be opened or paired, or is no longer what it was when the run or collection began.
    """

    base_model: str
    base_revision: str | None = None
    ft_model: str | None = None  # None: the base model, with ft_adapter
    ft_revision: str | None = None
    ft_adapter: str | None = None
    hook: str
    ft_hook: str | None = None  # None: the same as hook
    text: list[str]
    text_column: list[str]
    chat_template: bool
    seq_len: int
    pack: bool
    model_dtype: str
    skip_first: int
    max_norm_ratio: float
    batch_size: int  # sequences per forward pass
    dtype: str  # float16 or float32, of the rows
    devices: list[str]  # of the base and of the fine-tuned model, as `usable_device` gives them
    seed: int  # decides which sequences are held out
    live: bool = False  # the flags that errors name are those of train.py
    known: dict[str, str] | None = None  # `fingerprints` of the run or collection that goes on; None for a new one

    def __post_init__(self):
        self.batch_flag = "--model-batch-size" if self.live else "--batch-size"
        self.check_settings()
        if not self.ft_model:
            self.ft_model, self.ft_revision = self.base_model, self.ft_revision or self.base_revision
        self.drawn = drawn_together(self.batch_size, self.pack)
        self.open_models(self.open_texts())
        self.median = self.scale = None  # [2] each, float64: median norm and stored_scale
        self.held_out_until = 0  # index of the first sequence from which on none is held out
        self.stream: Iterator[Sequence] | None = None
        self.kept: dict[tuple[int, ...], lm.RawRows] = {}  # forward passes of the calibration, by their sequences
        self.calibrating, self.kept_until = False, 0  # index of the last sequence that was calibrated on

    def check_settings(self) -> None:
        if self.seq_len < 2:
            raise ValueError(f"--seq-len {self.seq_len}: must be at least 2")
        if self.batch_size < 1:
            raise ValueError(f"{self.batch_flag} {self.batch_size}: must be at least 1")
        if not 0 <= self.skip_first < self.seq_len:
            raise ValueError(f"--skip-first {self.skip_first}: must be at least 0 and below --seq-len {self.seq_len}")
        ratio = self.max_norm_ratio
        if not 1 < ratio < float("inf"):  # which JSON cannot hold
            raise ValueError(f"--max-norm-ratio {ratio:g}: must be above 1 and finite; 1e9 keeps rows of every norm")
        if not self.text:
            raise ValueError("--text is missing: give at least one source of text")
        if not self.ft_model and not self.ft_adapter:
            raise ValueError("--ft-model is missing: give the fine-tuned model, or with --ft-adapter what it adds to the base")

    def open_texts(self) -> dict[str, Path]:
        """Load the tokenizer and open the texts. Returns the folders among the models and the adapter, by their flags.

        A run or collection that goes on gets the commits of models and texts that it began with, not the newest on the Hub.
        """
        names = {"--base-model": self.base_model, "--ft-model": self.ft_model, "--ft-adapter": self.ft_adapter}
        paths = {flag: Path(name).expanduser() for flag, name in names.items() if name}
        folders = {flag: path for flag, path in paths.items() if path.is_dir()}
        known = self.known or {}
        if "--base-model" not in folders:
            self.base_revision = known.get("--base-model", self.base_revision)
        if "--ft-model" not in folders:
            self.ft_revision = known.get("--ft-model", self.ft_revision)
        self.tokenizer = lm.load_paired_tokenizer(
            self.base_model, self.ft_model, self.base_revision, self.ft_revision, self.ft_adapter
        )
        self.open_sources = partial(
            texts.open_sources, self.text, self.tokenizer, self.seq_len, skip_first=self.skip_first, pack=self.pack,
            text_column=tuple(self.text_column), chat_template=self.chat_template,
            commits={flag.removeprefix("--text "): commit for flag, commit in known.items()},
        )  # fmt: skip
        self.sources = self.open_sources()
        return folders

    def open_models(self, folders: dict[str, Path]) -> None:
        """Load both models and check that the texts and each other's activations fit them."""
        self.fingerprints = {flag: texts.fingerprint(lm.weight_files(folder)) for flag, folder in folders.items()}
        self.fingerprints |= {f"--text {source.name}": source.fingerprint() for source in self.sources}
        self.refuse_other_content()  # before the models are loaded
        self.models = [
            lm.load_model(self.base_model, self.model_dtype, self.devices[0], "--base-model", revision=self.base_revision),
            lm.load_model(
                self.ft_model,
                self.model_dtype,
                self.devices[1],
                "--ft-model",
                revision=self.ft_revision,
                adapter=self.ft_adapter,
            ),
        ]
        flags = ("--hook", "--ft-hook" if self.ft_hook else "--hook")
        self.ft_hook = self.ft_hook or self.hook
        given = zip(self.models, (self.hook, self.ft_hook), flags, strict=True)
        self.hooks = [lm.parse_hook(model, hook, flag) for model, hook, flag in given]
        self.d_model, d_ft = (lm.probe_hook(m, h, f) for m, h, f in zip(self.models, self.hooks, flags, strict=True))
        if self.d_model != d_ft:
            raise ValueError(
                f"--hook: base activations have {self.d_model} values and fine-tuned ones {d_ft}; they cannot be paired"
            )
        for model, flag in zip(self.models, ("--base-model", "--ft-model"), strict=True):
            longest = lm.max_positions(model)
            if longest and self.seq_len > longest:
                raise ValueError(f"--seq-len {self.seq_len}: {flag} was made for {longest} positions at most; lower it")
        self.revisions = [
            lm.cached_commit(self.base_model, self.base_revision), lm.cached_commit(self.ft_model, self.ft_revision)
        ]  # fmt: skip
        commits = dict(zip(("--base-model", "--ft-model"), self.revisions, strict=True))
        commits["--ft-adapter"] = lm.cached_commit(self.ft_adapter) if self.ft_adapter else None
        self.fingerprints |= {flag: commit for flag, commit in commits.items() if commit}
        self.refuse_other_content()

    def refuse_other_content(self) -> None:
        """ValueError if a model or text is not the one that the run or collection began with."""
        for flag, now in self.fingerprints.items():
            if self.known is not None and self.known.get(flag) != now:
                raise ValueError(
                    f"{flag}: has other content than when this {'run' if self.live else 'collection'} began; bring that back, "
                    f"or begin anew with another {'--run-name' if self.live else '--output'}"
                )

    # --- sequences

    def start(self, sequence: int = 0) -> None:
        """Go to the given sequence of the texts, which are read from their beginning."""
        if self.stream is not None:
            self.sources = self.open_sources()
        stream = (Sequence(i, *drawn) for i, drawn in enumerate(texts.mix(self.sources)))
        self.stream = itertools.islice(stream, sequence, None)

    def ahead(self) -> Iterator[Sequence]:
        """The sequences that come next; the stream stays where it is."""
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

            def note(acts: lm.RawRows) -> None:
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
        self.median, self.scale = median_and_scale(norms[first[:n_rows]], self.d_model, self.max_norm_ratio)

    def held_out(self, wanted: int, so_far: int = 0) -> Iterator[Rows]:
        """The rows of held-out sequences: with the `so_far` known ones `wanted`, as closely as whole sequences allow.

        One of every four sequences ahead, from `held_out_until` on; that index follows the sequences taken.
        """
        for batch, acts, taken in self.held_out_batches(wanted, so_far):
            yield self.rows(batch, acts, taken)

    def held_out_batches(self, wanted: int, so_far: int = 0) -> Iterator[tuple[list[Sequence], lm.RawRows, int]]:
        """Forward batches of candidates, their activations, and how many of the batch's first sequences are held out."""
        candidates = (s for s in self.ahead() if s.index >= self.held_out_until and is_candidate(s.index, self.seed))
        enough = so_far >= wanted
        while not enough and (batch := list(itertools.islice(candidates, self.batch_size))):
            acts = self.activations(batch)
            median = median_norm(acts.norms) if self.median is None else self.median  # an estimate, to calibrate with
            good, _ = survivors(acts.norms, median, self.max_norm_ratio)
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
                self.kept.clear()  # more sequences were held out than the calibration expected: these batches are not needed
            parts = [self.rows(batch, self.activations(batch)) for batch in self.by_length(drawn)]
            if not parts:  # the texts ended with held-out sequences
                nothing = torch.empty(0, self.d_model)
                parts = [Rows(nothing, nothing, np.empty((3, 0), np.int32), [], Counter())]
            base, ft = torch.cat([part.base for part in parts]), torch.cat([part.ft for part in parts])
            columns = np.concatenate([part.columns for part in parts], axis=1)
            yield Rows(base, ft, columns, passed, sum((part.left_out for part in parts), Counter()))

    def training_draws(self, stream: Iterator[Sequence]) -> Iterator[tuple[list[Sequence], list[Sequence]]]:
        """`drawn` sequences of the stream that are not held out, and all sequences read from it to find them."""
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

    def activations(self, batch: list[Sequence]) -> lm.RawRows:
        """Run both models over a forward batch, unless the calibration did so already and kept the activations."""
        indices = tuple(s.index for s in batch)
        if indices in self.kept:
            acts = self.kept.pop(indices)
            base, ft = (x.to(model._module.device) for x, model in zip((acts.base, acts.ft), self.models, strict=True))
            return acts._replace(base=base, ft=ft)
        sequences = [s.tokens for s in batch]
        acts = lm.paired_activations(
            self.models, self.hooks, self.d_model, indices, sequences, skip_first=self.skip_first, batch_flag=self.batch_flag
        )
        if self.calibrating:
            self.kept[indices] = acts._replace(base=acts.base.cpu(), ft=acts.ft.cpu())
        return acts

    def rows(self, batch: list[Sequence], acts: lm.RawRows, taken: int | None = None) -> Rows:
        """The rows of the first `taken` sequences of a batch (None: all)."""
        lengths = np.array([len(s.tokens) for s in batch])  # [sequences]
        longest, taken = lengths.max(), len(batch) if taken is None else taken
        good, finite = survivors(acts.norms, self.median, self.max_norm_ratio)
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


class GatheredRows:
    """Rows of whole forward batches, gathered until they fill a shard of a dataset or half of the live buffer.

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


def survivors(norms: np.ndarray, median: np.ndarray, max_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Which rows to store, and which are finite: two [rows] bool arrays.

    norms [rows, 2], median [2]. A row is stored if in both models it is finite and its norm <= max_ratio * median.
    """
    finite = np.isfinite(norms).all(1)
    return finite & (norms <= max_ratio * median).all(1), finite


def median_norm(norms: np.ndarray) -> np.ndarray:
    """[2] median of the norms [rows, 2] of rows that are finite in both models; 0 where there is none."""
    finite = norms[np.isfinite(norms).all(1)]
    return np.median(finite, axis=0) if len(finite) else np.zeros(2)


def median_and_scale(norms: np.ndarray, d_model: int, max_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Median norm [2] and stored_scale [2] of the first rows: sqrt(d_model) / mean norm of the survivors, per model.

    norms: [rows, 2] float64. The median comes first, so that activation sinks move neither the limit nor the scale.
    """
    if not np.isfinite(norms).all(1).any():
        bad = [name for name, x in zip(("base", "fine-tuned"), norms.T, strict=True) if not np.isfinite(x).all()]
        raise ValueError(
            f"--model-dtype: the first {len(norms):,} activations of the {' and of the '.join(bad)} model all hold inf or nan; "
            "give --model-dtype bfloat16 or float32, or if it is that already, a model with sound weights"
        )
    median = median_norm(norms)
    if not (median > 0).all():
        raise ValueError("--hook: most of the first activations there are zero; give another module")
    stored, _ = survivors(norms, median, max_ratio)
    if not stored.any():
        raise ValueError(f"--max-norm-ratio {max_ratio:g}: leaves out every one of the first {len(norms)} rows; raise it")
    return median, np.sqrt(d_model) / norms[stored].mean(0)


def is_candidate(sequence: int, seed: int) -> bool:
    """Whether a sequence may be held out: one of every HELD_OUT_STRETCH in a row, at a random place among them."""
    stretch, place = divmod(sequence, HELD_OUT_STRETCH)
    return place == np.random.default_rng([seed, stretch]).integers(HELD_OUT_STRETCH)


def drawn_together(batch_size: int, pack: bool) -> int:
    """Sequences whose rows come at once. Packed ones are of one length, so there is nothing to sort."""
    return batch_size * (1 if pack else BUCKET)
