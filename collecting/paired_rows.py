"""Text -> several models -> rows: what `collect.py` stores and `live.py` trains on, so that both get the same.

Use: `start`, then `calibrate` and `held_out_draws`, which read the stream without moving it, then `training_draws`, and `rows`
of each draw. Everything is a function of the texts, the models and the seed, so that a restart gives the same rows again.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from collecting import language_model as lm
from collecting import text as texts
from collecting.rows import Draw, Rows, Sequence
from run import held_out
from run.machine import progress_bar

CALIBRATION_ROWS = 32_768  # rows that fix the outlier limit and the stored scale, before the first row is used
BUCKET = 8  # forward batches of unpacked texts that are sorted by length together, so that little is padding
REASONS = ("padding", "first_positions", "norm", "non_finite", "beyond_num_tokens")  # why a position gives no row


@dataclass(eq=False)
class Hook:
    """A place where all models are read, and what was found there about the first rows."""

    name: str  # as the user gave it
    paths: list[str]  # of each model, as `lm.parse_hook` gives it
    d_model: int
    median: np.ndarray | None = None  # [n_models] float64: median norm
    scale: np.ndarray | None = None  # [n_models] float64: stored_scale


@dataclass(kw_only=True, eq=False)
class PairedModels:
    """Two models or more, at one hook or more, over one stream of texts.

    The first settings are the flags of `config.ModelFlags`, which explains them. ValueError, naming the flag, for what cannot
    be opened or paired, or is no longer what it was when the run or collection began.
    """

    base_model: str
    model: list[str] = field(default_factory=list)  # NAME or NAME@REVISION of each model if there are more than two
    base_revision: str | None = None
    ft_model: str | None = None  # None: the base model, with ft_adapter
    ft_revision: str | None = None
    ft_adapter: str | None = None
    hook: list[str]
    ft_hook: str | None = None  # None: the same as hook, of which there is one
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
    devices: list[str]  # of each model, as `usable_device` gives them
    seed: int  # decides which sequences are held out
    live: bool = False  # the flags that errors name are those of train.py
    quiet: bool = False  # without progress bars: another process shows them
    known: dict[str, str] | None = None  # `fingerprints` of the run or collection that goes on; None for a new one

    def __post_init__(self):
        self.batch_flag = "--model-batch-size" if self.live else "--batch-size"
        self.check_settings()
        if not self.ft_model:
            self.ft_model, self.ft_revision = self.base_model, self.ft_revision or self.base_revision
        self.drawn = drawn_together(self.batch_size, self.pack)
        # (key in fingerprints, name, revision) of each behind the first two
        self.further = [(f"--model {one}", *split_revision(one)) for one in self.model[2:]]
        self.open_texts()
        self.open_models()
        self.held_out_until = 0  # index of the first sequence from which on none is held out
        self.stream: Iterator[Sequence] | None = None
        self.kept: dict[tuple[int, ...], list[lm.RawRows]] = {}  # forward passes of the calibration, by their sequences

    def check_settings(self) -> None:
        length, skip, ratio = self.seq_len, self.skip_first, self.max_norm_ratio
        wanted = {
            f"--seq-len {length}: must be at least 2": length >= 2,
            f"{self.batch_flag} {self.batch_size}: must be at least 1": self.batch_size >= 1,
            f"--skip-first {skip}: must be at least 0 and below --seq-len {length}": 0 <= skip < length,
            # JSON cannot hold inf
            f"--max-norm-ratio {ratio:g}: must be above 1 and finite; 1e9 keeps rows of every norm": 1 < ratio < float("inf"),
            "--text is missing: give at least one source of text": self.text,
            "--hook: the same module is given twice; leave one out": len({*map(output_of, self.hook)}) == len(self.hook),
            "--ft-hook: goes with one --hook; collect these one after the other": len(self.hook) == 1 or not self.ft_hook,
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
        names |= {key: name for key, name, _ in self.further}
        folders = {flag: path for flag, name in names.items() if name and (path := Path(name).expanduser()).is_dir()}
        commits = {flag: commit for flag, commit in (self.known or {}).items() if flag not in folders}
        self.base_revision = commits.get("--base-model", self.base_revision)
        self.ft_revision = commits.get("--ft-model", self.ft_revision)
        self.further = [(key, name, commits.get(key, revision)) for key, name, revision in self.further]
        self.tokenizer = lm.load_paired_tokenizer(
            self.base_model, self.ft_model, self.base_revision, self.ft_revision, self.ft_adapter
        )
        for _, name, revision in self.further:
            lm.check_tokenizer(self.tokenizer, name, "--model", revision)
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
        """Load all models and check that the texts and each other's activations fit them."""
        given = (
            ("--base-model", self.base_model, self.base_revision, None, "--hook", self.hook),
            ("--ft-model", self.ft_model, self.ft_revision, self.ft_adapter, *(
                ("--ft-hook", [self.ft_hook]) if self.ft_hook else ("--hook", self.hook)
            )),
            *(("--model", name, revision, None, "--hook", self.hook) for _, name, revision in self.further),
        )  # fmt: skip
        self.models, paths, self.revisions, widths = [], [], [], []
        for device, (flag, name, revision, adapter, hook_flag, hooks) in zip(self.devices, given, strict=True):
            model = lm.load_model(name, self.model_dtype, device, flag, revision, adapter)
            longest = getattr(model._module.config.get_text_config(), "max_position_embeddings", None)
            if longest and self.seq_len > longest:
                raise ValueError(f"--seq-len {self.seq_len}: {flag} was made for {longest} positions at most; lower it")
            self.models.append(model)
            paths.append([lm.parse_hook(model, hook, hook_flag) for hook in hooks])
            widths.append([lm.probe_hook(model, path, hook_flag) for path in paths[-1]])
            self.revisions.append(lm.cached_commit(name, revision))
        self.hooks = [Hook(name, list(at), d) for name, d, *at in zip(self.hook, widths[0], *paths, strict=True)]
        for found, (_, name, *_) in zip(widths[1:], given[1:], strict=True):
            for d_model, hook in zip(found, self.hooks, strict=True):
                if hook.d_model != d_model:
                    raise ValueError(
                        f"--hook {hook.name}: base activations have {hook.d_model} values and fine-tuned ones {d_model} "
                        f"({name}); they cannot be paired"
                    )
        orders = [lm.in_running_order(model, of_model) for model, of_model in zip(self.models, paths, strict=True)]
        self.hooks.sort(key=lambda hook: orders[0].index(hook.paths[0]))
        if any([hook.paths[m] for hook in self.hooks] != order for m, order in enumerate(orders)):
            raise ValueError("--hook: the models run through these modules in different orders; collect one after the other")
        commits = [*self.revisions, lm.cached_commit(self.ft_adapter) if self.ft_adapter else None]
        flags = ("--base-model", "--ft-model", *(key for key, *_ in self.further), "--ft-adapter")
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
        sources = self.sources
        stream = (Sequence(i, of, ids, sources[of].refused) for i, (of, ids) in enumerate(texts.mix(sources)))
        self.stream = itertools.islice(stream, sequence, None)

    def ahead(self) -> Iterator[Sequence]:
        """The sequences that come next; the stream stays where it is."""
        self.stream, ahead = itertools.tee(self.stream)
        return ahead

    # --- rows

    def calibrate(self, n_rows: int, val_rows: int, known: list[dict]) -> None:
        """Fix the median norm and the scale from the first rows ahead, or as an earlier calibration found them.

        n_rows: rows of the run or collection. val_rows: what `held_out_draws` will be asked for. The forward batches are those
        that it and `training_draws` need; their activations are kept for them in host memory. known: what a run or collection
        that goes on has written down of each hook; without "stored_scale" if it has not come so far.
        """
        if all(one.get("stored_scale") for one in known):
            for hook, one in zip(self.hooks, known, strict=True):
                hook.median, hook.scale = (np.array(one[name]) for name in ("median_norm", "stored_scale"))
            return
        rows, last, n_rows = 0, 0, min(n_rows, CALIBRATION_ROWS)
        for sequence in self.ahead():
            rows, last = rows + len(sequence.tokens) - self.skip_first, sequence.index
            if rows >= n_rows:
                break
        draws = self.held_out_draws(val_rows)
        self.held_out_until = draws[-1].batches[-1][-1].index + 1 if draws else 0
        draws = [draw for draw in draws if draw.batches[0][0].index <= last]
        draws += itertools.takewhile(lambda draw: draw.passed[0].index <= last, self.training_draws(self.ahead()))
        self.held_out_until = 0
        norms, columns = [], []
        with progress_bar("norms of the first rows", rows, delay=0, disable=self.quiet) as bar:
            for batch in itertools.chain.from_iterable(draw.batches for draw in draws):
                indices = tuple(s.index for s in batch)
                found = self.activations(batch)
                self.kept[indices] = [raw._replace(acts=[x.cpu() for x in raw.acts]) for raw in found]
                norms.append([raw.norms for raw in found])
                columns.append(found[0].columns)
                bar.update(int((columns[-1][0] <= last).sum()))
        sequence, position, _ = np.concatenate(columns, axis=1)
        first = np.lexsort((position, sequence))[:n_rows]  # in reading order
        for hook, of_hook in zip(self.hooks, zip(*norms, strict=True), strict=True):
            hook.median, hook.scale = median_and_scale(np.concatenate(of_hook)[first], hook, self.max_norm_ratio)

    def held_out_draws(self, wanted: int) -> list[Draw]:
        """The sequences to hold out from `held_out_until` on, a forward batch each.

        They are one of every four from the beginning of the texts, where the stream must be, until they have the wanted rows,
        outliers included, as closely as whole sequences allow.
        """
        candidates = (s for s in self.ahead() if held_out.is_candidate(s.index, self.seed))
        taken = held_out.choose(candidates, wanted, lambda s: len(s.tokens) - self.skip_first)
        return [Draw([batch], []) for batch in self.batches([s for s in taken if s.index >= self.held_out_until])]

    def training_draws(self, stream: Iterator[Sequence]) -> Iterator[Draw]:
        """All sequences that are not held out, in reading order, `drawn` of them at a time.

        The longest sequences of a draw come first: those of similar length share a batch.
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
            yield Draw(self.batches(sorted(drawn, key=lambda s: -len(s.tokens))), passed)

    def batches(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        return [sequences[i : i + self.batch_size] for i in range(0, len(sequences), self.batch_size)]

    def activations(self, batch: list[Sequence]) -> list[lm.RawRows]:
        """Run all models over a forward batch, unless the calibration did so and kept the activations: those of each hook."""
        indices = tuple(s.index for s in batch)
        if kept := self.kept.pop(indices, None):
            devices = [model._module.device for model in self.models]
            return [raw._replace(acts=[x.to(device) for x, device in zip(raw.acts, devices, strict=True)]) for raw in kept]
        return lm.paired_activations(
            self.models, [[hook.paths[m] for hook in self.hooks] for m in range(len(self.models))],
            [hook.d_model for hook in self.hooks], indices, [s.tokens for s in batch],
            skip_first=self.skip_first, batch_flag=self.batch_flag,
        )  # fmt: skip

    def forget(self, draws: Iterable[Draw]) -> None:
        """Free what the calibration kept of these draws."""
        for batch in itertools.chain.from_iterable(draw.batches for draw in draws):
            self.kept.pop(tuple(s.index for s in batch), None)

    def rows(self, draw: Draw, hooks: list[Hook]) -> list[Rows]:
        """The rows of a draw at each of these hooks: those within the norm limit, scaled, in float16 or float32."""
        parts: list[list[Rows]] = [[] for _ in hooks]
        for batch in draw.batches:
            found = dict(zip(self.hooks, self.activations(batch), strict=True))
            for of_hook, hook in zip(parts, hooks, strict=True):
                of_hook.append(self.rows_of_batch(batch, hook, found[hook]))
        made = []
        for of_hook, hook in zip(parts, hooks, strict=True):
            if not of_hook:  # the texts may end with held-out sequences
                nothing = [torch.empty(0, hook.d_model)] * len(self.models)
                of_hook.append(Rows(nothing, np.empty((3, 0), np.int32), [], Counter()))
            acts = [torch.cat(of_model) for of_model in zip(*(part.acts for part in of_hook), strict=True)]
            columns = np.concatenate([part.columns for part in of_hook], axis=1)
            made.append(Rows(acts, columns, draw.passed, sum((part.left_out for part in of_hook), Counter())))
        return made

    def rows_of_batch(self, batch: list[Sequence], hook: Hook, raw: lm.RawRows) -> Rows:
        """The rows that `lm.paired_activations` gave of a batch at a hook, filtered and scaled."""
        lengths = np.array([len(s.tokens) for s in batch])  # [sequences]
        good, finite = survivors(raw.norms, hook.median, self.max_norm_ratio)
        keep = np.flatnonzero(good)
        left_out = Counter(
            padding=int((lengths.max() - lengths).sum()),
            first_positions=int(np.minimum(lengths, self.skip_first).sum()),
            norm=int((finite & ~good).sum()),
            non_finite=int((~finite).sum()),
        )
        stored = []  # [kept, d_model] each
        for x, scale in zip(raw.acts, hook.scale, strict=True):
            stored.append((x[torch.from_numpy(keep).to(x.device)].float() * float(scale)).to(getattr(torch, self.dtype)))
            if stored[-1].isinf().any():
                raise ValueError(
                    "--max-norm-ratio: an activation is too large for the float16 of the buffer; lower it" if self.live else
                    f"--dtype float16: an activation is too large for it at {hook.name}; give --dtype float32, or lower "
                    "--max-norm-ratio"
                )  # fmt: skip
        return Rows(stored, raw.columns[:, keep], [], left_out)


def survivors(norms: np.ndarray, median: np.ndarray, max_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Which rows to store, and which are finite: two [rows] bool arrays.

    norms [rows, n_models], median [n_models]. A row is stored if in all models it is finite and its norm <= max_ratio * median.
    """
    finite = np.isfinite(norms).all(1)
    return finite & (norms <= max_ratio * median).all(1), finite


def median_and_scale(norms: np.ndarray, hook: Hook, max_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Median norm and stored_scale of the first rows: sqrt(d_model) / mean norm of the survivors; [n_models] each.

    norms: [rows, n_models] float64. The median comes first, so that activation sinks move neither the limit nor the scale.
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
        raise ValueError(f"--hook {hook.name}: most of the first activations there are zero; give another module")
    stored, _ = survivors(norms, median, max_ratio)
    if not stored.any():
        raise ValueError(f"--max-norm-ratio {max_ratio:g}: leaves out every one of the first {len(norms)} rows; raise it")
    return median, np.sqrt(hook.d_model) / norms[stored].mean(0)


def drawn_together(batch_size: int, pack: bool) -> int:
    """Sequences whose rows come at once. Packed ones are of one length, so there is nothing to sort."""
    return batch_size * (1 if pack else BUCKET)


def split_revision(model: str) -> tuple[str, str | None]:
    """`NAME@REVISION` -> (NAME, REVISION); a folder, or a name without @, has no revision."""
    name, _, revision = model.rpartition("@")
    return (name, revision) if name and revision and not Path(model).expanduser().exists() else (model, None)


def output_of(hook: str) -> str:
    """The hook with the end that says what of the module is read."""
    return hook if hook.endswith((".input", ".output")) else f"{hook}.output"
