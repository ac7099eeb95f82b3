"""A language model to whose activation at a hook a vector is added: its greedy answers, and its logits over given ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def plain(model):
    """The model of transformers inside a wrapper of nnsight, or the model itself."""
    return getattr(model, "_module", model)


def known_tokens(models: list) -> int:
    """How many token ids all of these models can read."""
    return min(plain(model).get_input_embeddings().weight.shape[0] for model in models)


@contextmanager
def added(model, hook: str, vectors: Tensor, where: Tensor) -> Iterator[None]:
    """Inside the block the activation at the hook is larger by a row's vector wherever `where` says.

    hook: path of a module; with .input at its end what goes into it, else its output. vectors: [rows, d_model] raw activations.
    where: [rows, seq] bool, of the positions in the order in which the model sees them; later ones, which a generation adds,
    are True.
    """
    path, seen = hook.removesuffix(".output").removesuffix(".input"), 0

    def larger(x: Tensor) -> Tensor:
        """x: [rows, seq, d_model], of the next `seq` positions."""
        nonlocal seen
        here = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        known = where[:, seen : seen + x.shape[1]]
        here[:, : known.shape[1]] = known.to(x.device)
        seen += x.shape[1]
        return torch.where(here[..., None], x.float() + vectors.to(x.device)[:, None], x.float()).to(x.dtype)

    def after(_, args, output):  # attention modules, and blocks of older transformers, give a tuple
        return (larger(output[0]), *output[1:]) if isinstance(output, tuple) else larger(output)

    def before(_, args, kwargs):
        if args:
            return (larger(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: larger(kwargs[first])}

    module = plain(model).get_submodule(path)
    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if hook.endswith(".input")
        else module.register_forward_hook(after)
    )
    handles = [handle]
    if (head := plain(model).get_output_embeddings()) is not None:
        # Of a slice, as of the last positions, torch's product is one for each row, with a copy of the weights each.
        handles.append(head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:])))
    try:
        yield
        if not seen:  # nothing would have been added, and no one would know
            raise ValueError(f"--hook {hook}: a forward pass does not reach it; give another module")
    finally:
        for one in handles:
            one.remove()


def steered(length: int, answer_from: int, skip_first: int, answer_alone: bool) -> Tensor:
    """[length] bool, the positions that get the vector: those that predict the answer, and those from `skip_first` on."""
    return torch.arange(length) >= (answer_from - 1 if answer_alone else min(skip_first, answer_from - 1))


@torch.no_grad()
def answers(
    model, hook: str, prompts: list[list[int]], vectors: Tensor, *, tokens: int, skip_first: int, answer_alone: bool = False,
    after_token: Callable[[], None] = lambda: None,
) -> list[list[int]]:  # fmt: skip
    """The greedy answer of at most `tokens` token ids to each prompt, its end token included, one vector [d_model] a prompt."""

    def no_end(ids: Tensor, _) -> Tensor:
        after_token()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    model, width = plain(model), max(map(len, prompts))
    ids, mask, where = (torch.zeros(len(prompts), width, dtype=kind) for kind in (torch.long, torch.long, torch.bool))
    for row, prompt in enumerate(prompts):  # padded on the left
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
        where[row, width - len(prompt) :] = steered(len(prompt), len(prompt), skip_first, answer_alone)
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    options = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "pad_token_id": ends[0] if ends else 0}
    with added(model, hook, vectors, where):
        made = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=tokens, **options,
            stopping_criteria=[no_end],
        )  # fmt: skip
    found = made[:, width:].tolist()
    return [answer[: next((i + 1 for i, token in enumerate(answer) if token in ends), tokens)] for answer in found]


@torch.no_grad()
def answer_logits(
    model, hook: str, prompts: list[list[int]], told: list[list[int]], vectors: Tensor, *, skip_first: int,
    answer_alone: bool = False,
) -> Tensor:  # fmt: skip
    """[tokens of all answers, vocabulary] the logits of the predictions of given answers, one vector [d_model] a prompt."""
    model, lengths = plain(model), [len(prompt) + len(answer) for prompt, answer in zip(prompts, told, strict=True)]
    ids, mask, where = (torch.zeros(len(told), max(lengths), dtype=kind) for kind in (torch.long, torch.long, torch.bool))
    predicts = where.clone()
    for row, (prompt, answer, length) in enumerate(zip(prompts, told, lengths, strict=True)):  # padded on the right
        ids[row, :length], mask[row, :length] = torch.tensor(prompt + answer), 1
        where[row, :length] = steered(length, len(prompt), skip_first, answer_alone)
        predicts[row, len(prompt) - 1 : length - 1] = True
    kept = max(lengths) - min(map(len, prompts)) + 1  # positions at the end, of which the logits are asked
    fewer = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with added(model, hook, vectors, where):
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False, **fewer).logits
    return logits[predicts[:, -logits.shape[1] :].to(logits.device)]
