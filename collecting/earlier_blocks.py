"""The blocks of a model before a hook, run once for many passes that only differ from the hook on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from collecting.steered_model import plain

CHECKED: WeakKeyDictionary[torch.nn.Module, dict[str, bool]] = WeakKeyDictionary()  # what `restarts` said, of model and hook


@contextmanager
def run_once(model, hook: str) -> Iterator[None]:
    """The first forward pass in this context is a whole one. Those after it begin at the model's block of the hook, which gets
    what it got in the first pass, repeated for as many rows: they must be of the same sequences.

    A model that has no such blocks, or whose later blocks need more than their input, runs whole each time.
    """
    model = plain(model)
    place = blocks_before(model, hook)
    known = CHECKED.setdefault(model, {})
    if place is not None and hook not in known:
        known[hook] = restarts(model, hook)
    if place is None or not known[hook]:
        yield
    else:
        with skipping(*place):
            yield


def blocks_before(model, hook: str) -> tuple[list[torch.nn.Module], torch.nn.Module] | None:
    """The blocks that run before the one at the hook ("model.layers.13.mlp.output": of number 13), and this one."""
    found = re.match(r"(.+?)\.(\d+)(\.|$)", hook)
    stack = model.get_submodule(found[1]) if found else None
    if not isinstance(stack, torch.nn.ModuleList) or int(found[2]) == 0:
        return None
    return list(stack[: int(found[2])]), stack[int(found[2])]


@contextmanager
def skipping(before: list[torch.nn.Module], block: torch.nn.Module) -> Iterator[None]:
    """`run_once`, for blocks that are known."""
    first: Tensor | None = None  # [rows, seq, d_model], what the block got in the first pass
    in_tuple, own = False, [vars(one).get("forward") for one in before]

    def pass_on(*args, **kwargs):
        x = next(iter([*args, *kwargs.values()]))
        return (x,) if in_tuple else x

    def given(_, args, kwargs):
        nonlocal first
        x = next(iter([*args, *kwargs.values()]))
        if first is None:
            first = x.detach()
            for one in before:
                one.forward = pass_on
        x = first.repeat(len(x) // len(first), 1, 1)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): x})

    def gave(_, __, output) -> None:  # blocks of older transformers give a tuple
        nonlocal in_tuple
        in_tuple = isinstance(output, tuple)

    hooks = [block.register_forward_pre_hook(given, prepend=True, with_kwargs=True), before[-1].register_forward_hook(gave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for one, forward in zip(before, own, strict=True):
            vars(one).pop("forward", None)
            if forward is not None:
                one.forward = forward


@torch.no_grad()
def restarts(model, hook: str) -> bool:
    """Whether passes that begin at the hook's block give what whole ones do: not where later blocks read more of earlier ones
    than their output, as where they share keys and values."""
    ids = torch.arange(1, 9, device=model.device)[None]
    whole = model(input_ids=ids, use_cache=False).logits
    try:
        with skipping(*blocks_before(model, hook)):
            again = [model(input_ids=ids, use_cache=False).logits for _ in range(2)][1]
    except (RuntimeError, KeyError, IndexError, TypeError, AttributeError):
        return False
    return torch.allclose(again.float(), whole.float(), rtol=1e-3, atol=1e-3 * whole.float().abs().max().item())
