"""What the models lose when the activation at the hook is replaced, and what latents carry from one model to the other.

The crosscoder's part of the two models' forward passes: reconstruction and zero in place of each model's activation
(loss recovered), and the base model's activation with the fine-tuned model's side of some latents (the diffing experiment of
Minder et al., arXiv 2504.02922). All in raw activation space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from analysis.data import Data, Text
from collecting import language_model as lm
from collecting.chat import answer_marker
from collecting.earlier_blocks import run_once
from collecting.steered_model import plain
from crosscoder import CrossCoder
from run.machine import progress_bar

FIRST_TOKENS = 10  # of an answer, or of a sequence: where fine-tuning shows most (arXiv 2504.02922)
POSITIONS_TOGETHER = 512  # of one batch, whose log-probabilities over the vocabulary are in memory at once
ROWS_TOGETHER = 1024  # tokens whose codes are in memory at once
MOST_TOKENS, LEAST_TOKENS = 65_536, 512  # patched where no number is given
ON_CPU = 2e11  # tokens * parameters of a model on a CPU: less than a minute
FIRST_RANKED = 10  # latents of each direction that are added together
HIGHEST_SHARE = 0.05  # of the live latents, those with the highest relative norm: Minder et al.'s "effective" fine-tuned-only


def open_models(data: Data, flags: dict, device: str) -> list[tuple]:
    """(model, hook) of the base and of the fine-tuned model. ValueError where activations there are not as wide as the data's.

    flags: base_model, hook, ... as given to analyze.py; None: as pair.json says.
    """
    pair = data.pair
    base_hook = flags["hook"] or pair.get("hook")
    if base_hook is None:
        raise ValueError("--hook is missing: the dataset has no pair.json that says where it was collected")
    ft_hook = flags["ft_hook"] or flags["hook"] or pair.get("ft_hook") or base_hook
    ft = (ft_hook, "--ft-hook" if flags["ft_hook"] else "--hook", flags["ft_adapter"])
    opened = []
    for role, (hook, hook_flag, adapter) in {"base": (base_hook, "--hook", None), "ft": ft}.items():
        flag, name = f"--{role}-model", flags[f"{role}_model"]
        revision = pair.get(f"{role}_revision") if pair.get(f"{role}_model") == name else None
        model = lm.load_model(name, flags["model_dtype"], device, flag, revision, adapter)
        opened.append((model, lm.parse_hook(model, hook, hook_flag)))
        if (width := lm.probe_hook(*opened[-1], hook_flag)) != data.source.d_model:
            raise ValueError(
                f"{flag}: activations at {hook} have {width} values, the crosscoder takes {data.source.d_model}; "
                "give the models and the hook that it was trained on"
            )
    return opened


def answer_starts(ids: list[int], marker: tuple[list[int], list[int]]) -> list[int]:
    """Where in a sequence of token ids each answer of a chat begins. marker: as `chat.answer_marker` gives it."""
    before, space = marker
    ends = [i for i in range(len(before), len(ids) + 1) if ids[i - len(before) : i] == before]
    return [end + len(space) * (ids[end : end + len(space)] == space) for end in ends]


def first_tokens(sequences: list[np.ndarray], marker, skip_first: int) -> tuple[list[np.ndarray], str]:
    """For each sequence which predictions (position p predicts token p + 1) are of first tokens, and what that means here."""
    starts = [[start - 1 for start in answer_starts(s.tolist(), marker)] if marker else [] for s in sequences]
    rule = f"the first {FIRST_TOKENS} tokens of each answer, after the chat template's prompt"
    if not any(starts):
        starts = [[skip_first]] * len(sequences)
        rule = f"the first {FIRST_TOKENS} tokens of each sequence after the {skip_first} left out (the texts hold no chat)"
    masks = [np.zeros(len(s), dtype=bool) for s in sequences]
    for mask, places in zip(masks, starts, strict=True):
        for place in places:
            mask[max(0, place) : place + FIRST_TOKENS] = True
    return masks, rule


def position_losses(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the targets and KL(reference || logits), in nats, at each position: float64 [positions, 2].

    logits, reference: [positions, vocabulary]; targets: [positions] int64. The vocabulary that both know counts.
    """
    known, found = min(logits.shape[-1], reference.shape[-1]), []
    for start in range(0, max(1, len(targets)), POSITIONS_TOGETHER):
        part = slice(start, start + POSITIONS_TOGETHER)
        log_q, log_p = (x[part].float().log_softmax(-1) for x in (logits, reference))
        loss = -log_q.gather(-1, targets[part, None])[:, 0]
        if log_p.shape != log_q.shape:
            log_q, log_p = (x[:, :known].log_softmax(-1) for x in (log_q, log_p))
        found.append(torch.stack([loss, (log_p.exp() * (log_p - log_q)).sum(-1)], dim=1).double())
    return torch.cat(found)


def patched_batch(
    models: list[tuple], crosscoder: CrossCoder, sequences: list[np.ndarray], first: list[np.ndarray], skip_first: int,
    max_norm: list[float], sets: dict[str, tuple[Tensor, Tensor]],
) -> Iterator[tuple[tuple[str, str], Tensor]]:  # fmt: skip
    """((of what, name), float64 [2]): sums over all predictions (at position p of token p + 1), and over those of first tokens.

    Names are those of `summarise`; ("tokens", "") is how many predictions these are.

    Args:
        first: which predictions of each sequence are of first tokens.
        max_norm: [n_models] a position whose activation in one of the models is longer keeps what the model computes.
        sets: name -> [n] int64 latents, and [n, d_model] the fine-tuned minus the base model's decoder row of each.
    """
    (ids, mask), (is_first, _) = lm.pad_batch(sequences), lm.pad_batch(first)
    lm.refuse_unknown_tokens([model for model, _ in models], ids)
    kept = mask & (torch.arange(ids.shape[1]) >= skip_first)  # [batch, seq] where activations are replaced
    predicts = kept[:, :-1] & mask[:, 1:]
    weight = torch.stack([torch.ones_like(is_first), is_first])[:, :, :-1][:, predicts].double()  # [2, predictions]
    device = models[0][0]._module.device
    ids, attention, kept, predicts, weight = (t.to(device) for t in (ids, mask.long(), kept, predicts, weight))
    yield ("tokens", ""), weight.sum(1).cpu()
    intact = [lm.read_logits(*one, ids, attention) for one in models]  # (activation, logits) of each model
    for (activation, _), most in zip(intact, max_norm, strict=True):
        kept &= activation.float().norm(dim=-1) <= most
    x = torch.stack([activation[kept].float() for activation, _ in intact], dim=1)  # [rows, n_models, d_model]
    x_hat, carried = torch.empty_like(x), {name: torch.empty_like(x[:, 0]) for name in sets}
    for i in range(0, len(x), ROWS_TOGETHER):
        part = slice(i, i + ROWS_TOGETHER)
        f = crosscoder.encode(x[part])
        x_hat[part] = crosscoder.decode(f)
        for name, (latents, difference) in sets.items():
            carried[name][part] = f[:, latents] @ difference

    def scored(logits: Tensor, reference: Tensor) -> Tensor:
        """[2, 2] sums of the loss and of the KL."""
        ours, theirs = (part[:, :-1][predicts] for part in (logits, reference))
        return (weight @ position_losses(ours, theirs, ids[:, 1:][predicts])).T.cpu()

    def spliced_logits(m: int, rows: Tensor) -> Tensor:
        """Logits of model m with these rows [kept, d_model] in place of its activation."""
        spliced = intact[m][0].clone()
        spliced[kept] = rows.to(spliced.dtype)
        return lm.read_logits(*models[m], ids, attention, spliced)[1]

    # each model with its own reconstruction, and with nothing
    for m, name in enumerate(("base", "ft")):
        logits = intact[m][1]
        yield (name, "loss_intact"), scored(logits, logits)[0]
        for what, rows in (("reconstruction", x_hat[:, m]), ("zero", torch.zeros_like(x_hat[:, m]))):
            loss, kl = scored(spliced_logits(m, rows), logits)
            yield (name, f"loss_{what}"), loss
            yield (name, f"kl_{what}"), kl
    # either model's later layers on the base model's activation with what some latents add to it
    base, ft_logits = x[:, 0], intact[1][1]
    yield ("base model", "before"), scored(intact[0][1], ft_logits)[1]
    yield ("ft model", "before"), scored(spliced_logits(1, base), ft_logits)[1]
    for m, half in enumerate(("base model", "ft model")):
        for name, rows in carried.items():
            yield (half, name), scored(spliced_logits(m, base + rows), ft_logits)[1]


def summarise(totals: dict[tuple[str, str], Tensor], sizes: dict[str, int]) -> dict:
    """Means from the totals of `patched_batch`: {"all": ..., "first": ...} of each number, None without such a token.

    sizes: how many latents each set has.
    """
    tokens = totals.pop(("tokens", ""))
    means = {key: total / tokens for key, total in totals.items()}
    for name in ("base", "ft"):
        intact, spliced, zero = (means[name, f"loss_{what}"] for what in ("intact", "reconstruction", "zero"))
        means[name, "loss_recovered"] = (zero - spliced) / (zero - intact)
    pairs = {
        key: {where: float(v) if n else None for where, v, n in zip(("all", "first"), mean, tokens, strict=True)}
        for key, mean in means.items()
    }
    diffing = {
        half: {"before": pairs[half, "before"]} | {name: {"latents": n, "kl": pairs[half, name]} for name, n in sizes.items()}
        for half in ("base model", "ft model")
    }
    models = {name: {what: pair for (of, what), pair in pairs.items() if of == name} for name in ("base", "ft")}
    return {"tokens": {"all": int(tokens[0]), "first": int(tokens[1])}, **models, "diffing": diffing}


def usual_tokens(models: list[tuple]) -> int:
    """How many tokens are patched where nobody says: on a CPU no more than take a minute."""
    large = [model for model, _ in models if plain(model).device.type == "cpu"]
    parameters = max((sum(weight.numel() for weight in plain(model).parameters()) for model in large), default=0)
    return min(MOST_TOKENS, max(LEAST_TOKENS, int(ON_CPU / max(1, parameters))))


def take_sequences(text: Text, tokens: int) -> Iterator[np.ndarray]:
    """Held-out sequences, then training ones, until they hold that many tokens."""
    for rows in (slice(text.held_out), slice(text.held_out, None)):
        for sequence in np.unique(text.sequence[rows]):
            if tokens <= 0:
                return
            ids = text.tokens(sequence)
            yield ids[:tokens]
            tokens -= len(ids)


def choose_sets(table: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The sets of latents that are added to the base model's activation, by name; `report.SET_NAMES` describes them."""
    live, tags = ~table["dead"], table["tag"]
    ft_only = np.flatnonzero(live & (tags == "ft_only"))
    shared = np.flatnonzero(live & (tags == "shared"))
    by_norm = np.flatnonzero(live)[np.argsort(-table["relative_norm"][live])]
    random = np.random.default_rng(seed)
    as_many_shared = random.permutation(shared)[: len(ft_only)]
    first = np.flatnonzero(live & (table["rank"] <= FIRST_RANKED))
    sets = {
        "first_ranked": first,
        "as_many_random": random.permutation(np.setdiff1d(np.flatnonzero(live), first))[: len(first)],
        "ft_only": ft_only,
        "ft_only_by_both": np.flatnonzero(live & (tags == "ft_only") & (table["tag_scaling"] == "ft_only")),
        "highest_relative_norm": by_norm[: max(1, round(HIGHEST_SHARE * len(by_norm)))],
        "as_many_shared": as_many_shared,
        "all": table["latent"],
    }
    return {name: np.sort(latents) for name, latents in sets.items()}


@torch.no_grad()
def patch_models(
    models: list[tuple], crosscoder: CrossCoder, data: Data, sets: dict[str, np.ndarray], tokenizer, *, tokens: int,
    batch_size: int,
) -> dict:  # fmt: skip
    """Losses and divergences over the predictions in the first `tokens` tokens of the texts, and over those of first tokens.

    models: (model, hook) of the base and the fine-tuned one, on one device. sets: as `choose_sets` gives them.
    """
    pair = data.pair
    skip_first, ratio = pair.get("skip_first", 1), pair.get("max_norm_ratio", math.inf)
    max_norm = [ratio * median for median in pair.get("median_norm", [math.inf, math.inf])]
    sequences = list(take_sequences(data.text, tokens))
    marker = answer_marker(tokenizer) if tokenizer is not None and pair.get("chat_template") else None
    first, first_rule = first_tokens(sequences, marker, skip_first)
    W_raw = crosscoder.W_dec / crosscoder.scale[:, None]  # [d_hidden, n_models, d_model] rows as raw activations
    latents = {name: torch.from_numpy(chosen).to(W_raw.device) for name, chosen in sets.items() if len(chosen)}
    carried = {name: (chosen, W_raw[chosen, 1] - W_raw[chosen, 0]) for name, chosen in latents.items()}
    totals: dict[tuple[str, str], Tensor] = {}
    with progress_bar("patching", sum(map(len, sequences))) as bar:
        for start in range(0, len(sequences), batch_size):
            part = slice(start, start + batch_size)
            with run_once(*models[0]), run_once(*models[1]):
                of_batch = patched_batch(models, crosscoder, sequences[part], first[part], skip_first, max_norm, carried)
                for key, found in of_batch:
                    totals[key] = totals.get(key, 0) + found
                    share = sum(map(len, sequences[part])) / (13 + 2 * len(carried))  # of the sums that a batch gives
                    bar.update(min(share, bar.total - bar.n))  # tqdm warns where rounding passes the total
    result = summarise(totals, {name: len(chosen) for name, chosen in latents.items()})
    result["rule"] = (
        f"Replaced are the activations that the dataset holds: the first {skip_first} positions of a sequence and activations "
        f"above {ratio:g} times the median norm stay as the model computes them. Losses are means over the predictions made "
        f"from position {skip_first} on, in nats. 'first' are {first_rule}."
    )
    return result
