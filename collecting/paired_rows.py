"""Text -> two models -> rows: what `collect.py` stores and `live.py` trains on, so that both get the same.

Use: `start`, then `calibrate` and `held_out`, which read the stream without moving it, then `training_rows`. Everything is a
function of the texts, the models and the seed, so that a restart gives the same rows again.
"""

from __future__ import annotations

import itertools
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
from run import held_out
from run.machine import progress_bar

CALIBRATION_ROWS = 32_768  # rows that fix the outlier limit and the stored scale, before the first row is used
BUCKET = 8  # forward batches of unpacked texts that are sorted by length together, so that little is padding
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
        self.open_texts()
        self.open_models()
        self.median = self.scale = None  # [2] each, float64: median norm and stored_scale
        self.held_out_until = 0  # index of the first sequence from which on none is held out
        self.stream: Iterator[Sequence] | None = None
        self.kept: dict[tuple[int, ...], lm.RawRows] = {}  # forward passes of the calibration, by their sequences

    def check_settings(self) -> None:
        length, skip, ratio = self.seq_len, self.skip_first, self.max_norm_ratio
        wanted = {
            f"--seq-len {length}: must be at least 2": length >= 2,
            f"{self.batch_flag} {self.batch_size}: must be at least 1": self.batch_size >= 1,
            f"--skip-first {skip}: must be at least 0 and below --seq-len {length}": 0 <= skip < length,
            # JSON cannot hold inf
            f"--max-norm-ratio {ratio:g}: must be above 1 and finite; 1e9 keeps rows of every norm": 1 < ratio < float("inf"),
            "--text is missing: give at least one source of text": self.text,
            "--ft-model is missing: give the fine-tuned model, or its --ft-adapter alone": self.ft_model or self.ft_adapter,
        }
        for message, fine in wanted.items():
            if not fine:
                raise ValueError(message)

    def open_texts(self) -> None:
        """Load the tokenizer, open the texts and note what the texts and the local models hold.

        A run or collection that goes on gets the commits of models and texts that it began with, not the newest on the Hub.
        """
        names = {"--base-model": self.base_model, "--ft-model": self.ft_model, "--ft-adapter": self.ft_adapter}
        folders = {flag: path for flag, name in names.items() if name and (path := Path(name).expanduser()).is_dir()}
        commits = {flag: commit for flag, commit in (self.known or {}).items() if flag not in folders}
        self.base_revision = commits.get("--base-model", self.base_revision)
        self.ft_revision = commits.get("--ft-model", self.ft_revision)
        self.tokenizer = lm.load_paired_tokenizer(
            self.base_model, self.ft_model, self.base_revision, self.ft_revision, self.ft_adapter
        )
        self.open_sources = partial(
            texts.open_sources, self.text, self.tokenizer, self.seq_len, skip_first=self.skip_first, pack=self.pack,
            text_column=tuple(self.text_column), chat_template=self.chat_template,
            commits={flag.removeprefix("--text "): commit for flag, commit in commits.items()},
        )  # fmt: skip
        self.sources = self.open_sources()
        self.fingerprints = {flag: texts.fingerprint(lm.weight_files(folder)) for flag, folder in folders.items()}
        self.fingerprints |= {f"--text {s.name}": s.commit or texts.fingerprint(s.files) for s in self.sources}
        self.refuse_other_content()  # before the models are loaded

    def open_models(self) -> None:
        """Load both models and check that the texts and each other's activations fit them."""
        ft_hook_flag, self.ft_hook = "--ft-hook" if self.ft_hook else "--hook", self.ft_hook or self.hook
        given = (
            ("--base-model", self.base_model, self.base_revision, None, "--hook", self.hook),
            ("--ft-model", self.ft_model, self.ft_revision, self.ft_adapter, ft_hook_flag, self.ft_hook),
        )
        self.models, self.hooks, self.revisions, widths = [], [], [], []
        for device, (flag, name, revision, adapter, hook_flag, hook) in zip(self.devices, given, strict=True):
            model = lm.load_model(name, self.model_dtype, device, flag, revision, adapter)
            longest = getattr(model._module.config.get_text_config(), "max_position_embeddings", None)
            if longest and self.seq_len > longest:
                raise ValueError(f"--seq-len {self.seq_len}: {flag} was made for {longest} positions at most; lower it")
            self.models.append(model)
            self.hooks.append(lm.parse_hook(model, hook, hook_flag))
            widths.append(lm.probe_hook(model, self.hooks[-1], hook_flag))
            self.revisions.append(lm.cached_commit(name, revision))
        self.d_model, d_ft = widths
        if self.d_model != d_ft:
            raise ValueError(
                f"--hook: base activations have {self.d_model} values and fine-tuned ones {d_ft}; they cannot be paired"
            )
        commits = [*self.revisions, lm.cached_commit(self.ft_adapter) if self.ft_adapter else None]
        flags = ("--base-model", "--ft-model", "--ft-adapter")
        self.fingerprints |= {flag: commit for flag, commit in zip(flags, commits, strict=True) if commit}
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

    def calibrate(self, n_rows: int, val_rows: int, known: dict | None = None) -> None:
        """Fix the median norm and the scale from the first rows ahead, or as an earlier calibration found them.

        n_rows: rows of the run or collection. val_rows: what `held_out` will be asked for. The forward batches are those that
        it and `training_rows` need; their activations are kept for them in host memory. known: what a run or
        collection that goes on has written down.
        """
        if known:
            self.median, self.scale = (np.array(known[name]) for name in ("median_norm", "stored_scale"))
            return
        rows, last, n_rows = 0, 0, min(n_rows, CALIBRATION_ROWS)
        for sequence in self.ahead():
            rows, last = rows + len(sequence.tokens) - self.skip_first, sequence.index
            if rows >= n_rows:
                break
        batches = self.held_out_batches(val_rows)
        self.held_out_until = batches[-1][-1].index + 1 if batches else 0
        batches = [batch for batch in batches if batch[0].index <= last]
        for drawn, _ in itertools.takewhile(lambda draw: draw[1][0].index <= last, self.training_draws(self.ahead())):
            batches += drawn
        self.held_out_until = 0
        norms, columns = [], []
        with progress_bar("norms of the first rows", rows, delay=0) as bar:
            for batch in batches:
                acts = self.activations(batch)
                norms.append(acts.norms)
                columns.append(acts.columns)
                bar.update(int((acts.columns[0] <= last).sum()))
        sequence, position, _ = np.concatenate(columns, axis=1)
        first = np.lexsort((position, sequence))[:n_rows]  # in reading order
        self.median, self.scale = median_and_scale(np.concatenate(norms)[first], self.d_model, self.max_norm_ratio)

    def held_out(self, wanted: int) -> Iterator[Rows]:
        """The rows of `held_out_batches`, behind each of which `held_out_until` then lies."""
        for batch in self.held_out_batches(wanted):
            self.held_out_until = batch[-1].index + 1
            yield self.rows(batch)

    def held_out_batches(self, wanted: int) -> list[list[Sequence]]:
        """Forward batches of the sequences to hold out from `held_out_until` on.

        They are one of every four from the beginning of the texts, where the stream must be, until they have the wanted rows,
        outliers included, as closely as whole sequences allow.
        """
        candidates = (s for s in self.ahead() if held_out.is_candidate(s.index, self.seed))
        taken = held_out.choose(candidates, wanted, lambda s: len(s.tokens) - self.skip_first)
        return self.batches([s for s in taken if s.index >= self.held_out_until])

    def training_rows(self) -> Iterator[Rows]:
        """The rows of all sequences that are not held out, in reading order, `drawn` sequences at a time."""
        nothing = Rows(*torch.empty(2, 0, self.d_model), np.empty((3, 0), np.int32), [], Counter())
        for batches, passed in self.training_draws(self.stream):
            parts = [self.rows(batch) for batch in batches] or [nothing]  # the texts may end with held-out sequences
            base, ft = torch.cat([part.base for part in parts]), torch.cat([part.ft for part in parts])
            columns = np.concatenate([part.columns for part in parts], axis=1)
            yield Rows(base, ft, columns, passed, sum((part.left_out for part in parts), Counter()))

    def training_draws(self, stream: Iterator[Sequence]) -> Iterator[tuple[list[list[Sequence]], list[Sequence]]]:
        """Forward batches of `drawn` sequences that are not held out, and all sequences read from the stream to find them.

        The longest sequences come first: those of similar length share a batch.
        """
        while True:
            drawn, passed = [], []
            for sequence in stream:
                passed.append(sequence)
                if sequence.index >= self.held_out_until or not held_out.is_candidate(sequence.index, self.seed):
                    drawn.append(sequence)
                if len(drawn) == self.drawn:
                    break
            if not passed:
                return
            yield self.batches(sorted(drawn, key=lambda s: -len(s.tokens))), passed

    def batches(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        return [sequences[i : i + self.batch_size] for i in range(0, len(sequences), self.batch_size)]

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
        if self.median is None:  # in the calibration
            self.kept[indices] = acts._replace(base=acts.base.cpu(), ft=acts.ft.cpu())
        return acts

    def rows(self, batch: list[Sequence]) -> Rows:
        """The rows of a batch: those within the norm limit, scaled, in float16 or float32."""
        acts = self.activations(batch)
        lengths = np.array([len(s.tokens) for s in batch])  # [sequences]
        good, finite = survivors(acts.norms, self.median, self.max_norm_ratio)
        keep = np.flatnonzero(good)
        left_out = Counter(
            padding=int((lengths.max() - lengths).sum()),
            first_positions=int(np.minimum(lengths, self.skip_first).sum()),
            norm=int((finite & ~good).sum()),
            non_finite=int((~finite).sum()),
        )
        stored = []  # [kept, d_model] each
        for x, scale in zip((acts.base, acts.ft), self.scale, strict=True):
            stored.append((x[torch.from_numpy(keep).to(x.device)].float() * float(scale)).to(getattr(torch, self.dtype)))
            if stored[-1].isinf().any():
                raise ValueError(
                    "--max-norm-ratio: an activation is too large for the float16 of the buffer; lower it" if self.live else
                    "--dtype float16: an activation is too large for it; give --dtype float32, or lower --max-norm-ratio"
                )  # fmt: skip
        return Rows(*stored, acts.columns[:, keep], [], left_out)


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


def median_and_scale(norms: np.ndarray, d_model: int, max_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Median norm [2] and stored_scale [2] of the first rows: sqrt(d_model) / mean norm of the survivors, per model.

    norms: [rows, 2] float64. The median comes first, so that activation sinks move neither the limit nor the scale.
    """
    finite = norms[np.isfinite(norms).all(1)]
    if not len(finite):
        bad = [name for name, x in zip(("base", "fine-tuned"), norms.T, strict=True) if not np.isfinite(x).all()]
        raise ValueError(
            f"--model-dtype: the first {len(norms):,} activations of the {' and of the '.join(bad)} model all hold inf or nan; "
            "give --model-dtype bfloat16 or float32, or if it is that already, a model with sound weights"
        )
    median = np.median(finite, axis=0)
    if not (median > 0).all():
        raise ValueError("--hook: most of the first activations there are zero; give another module")
    stored, _ = survivors(norms, median, max_ratio)
    if not stored.any():
        raise ValueError(f"--max-norm-ratio {max_ratio:g}: leaves out every one of the first {len(norms)} rows; raise it")
    return median, np.sqrt(d_model) / norms[stored].mean(0)


def drawn_together(batch_size: int, pack: bool) -> int:
    """Sequences whose rows come at once. Packed ones are of one length, so there is nothing to sort."""
    return batch_size * (1 if pack else BUCKET)
