"""What a training step does with whole weights: their norms, rows of them, narrow copies, and Adam in one pass over each."""

from __future__ import annotations

import torch
from torch import Tensor

from ops import sparse


def with_norms(W_dec: Tensor) -> tuple[Tensor, Tensor]:
    """W_dec [d_hidden, n_models, d_model] itself, for one operation alone, and its norms [d_hidden, n_models], as `take`."""
    return _WithNorms.apply(W_dec)


def take(t: Tensor, some: Tensor, values: bool = True) -> tuple[Tensor, Tensor]:
    """t [d_hidden, ...] itself, and its rows `some`, all different, whose gradient is added to that of t where it lies.

    t itself must go to one operation alone. values: False where only shape and gradient of the rows are wanted, not values.
    """
    return _Take.apply(t, some, values)


class _WithNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W_dec):
        ctx.set_materialize_grads(False)
        norms = W_dec.norm(dim=-1)
        ctx.save_for_backward(W_dec, norms)
        return W_dec.view_as(W_dec), norms

    @staticmethod
    def backward(ctx, d_W_dec, d_norms):
        if d_norms is None:
            return d_W_dec
        W_dec, norms = ctx.saved_tensors
        d_W_dec = torch.zeros_like(W_dec) if d_W_dec is None else d_W_dec.contiguous()
        return d_W_dec.addcmul_(W_dec, (d_norms / norms).where(norms > 0, 0)[..., None])


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, some, values):
        ctx.save_for_backward(some)
        return t.view_as(t), t[some] if values else t.new_zeros(()).expand(len(some), *t.shape[1:])

    @staticmethod
    def backward(ctx, d_t, d_some):
        return d_t.contiguous().index_add_(0, ctx.saved_tensors[0], d_some), None, None


# --- narrow copies, which Adam's pass over the weights rewrites


def narrow(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter [d_hidden, n_models, d_model] as [d_hidden, n_models * d_model] in `dtype`, without gradient.

    The copy stays with the parameter. It is made anew where something other than `Adam` has changed the parameter since.
    """
    if dtype == weight.dtype:
        return weight.detach().flatten(1)
    copy, of, version = getattr(weight, "kept_copy", (None, weight, 0))
    if copy is None or copy.dtype != dtype or version != weight._version or _place(of) != _place(weight):
        copy = _keep(weight, weight.detach().flatten(1).to(dtype))
    return copy


def _keep(weight: Tensor, copy: Tensor) -> Tensor:
    weight.kept_copy = copy, weight.detach(), weight._version  # type: ignore[attr-defined]
    return copy


def _place(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class Adam(torch.optim.Adam):
    """PyTorch's fused Adam, and its state. On CUDA one kernel a parameter, which also rewrites the parameter's `narrow` copy.

    Gradients are divided by `grad_scale` [] on the way; PyTorch's own would write them back. All parameters step together.
    """

    grad_scale: Tensor

    def __init__(self, params, **settings):
        super().__init__(params, fused=True, **settings)

    @torch.no_grad()
    def step(self, closure=None):
        if not sparse.on_cuda(self.param_groups[0]["params"][0]):
            return super().step(closure)
        from ops import kernels

        for group in self.param_groups:
            tensors: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *tensors)  # as PyTorch's own step begins
            weights, gradients, means, squares, _, steps = tensors
            (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
            torch._foreach_add_(steps, 1)
            left = [1 - beta ** steps[0].double() for beta in (beta1, beta2)]  # of the first moments, which began at 0
            factors = torch.stack([self.grad_scale.double(), lr / left[0], left[1].rsqrt()]).float()  # [3]
            for weight, gradient, mean, square in zip(weights, gradients, means, squares, strict=True):
                copy, *_ = getattr(weight, "kept_copy", (None,))
                kernels.adam(weight, gradient, mean, square, copy, factors, beta1, 1 - beta1, beta2, 1 - beta2, eps)
                torch.autograd.graph.increment_version(weight)
                if copy is not None:
                    _keep(weight, copy)
        return None
