"""What PyTorch does on CUDA, where it does otherwise on the CPU that the fakes pretend to be on.

Fake CUDA tensors have no backward pass without a driver, so the tensors say "cpu" and CUDA's choices are put in place here:
types under autocast, dropout's mask, and what attention keeps and allocates. Read in PyTorch's sources: autocast_mode.h
(AT_FORALL_FP32), Dropout.cpp, sdp_utils.cpp, attention_backward.cu, flash_api.cpp.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

FLOAT32_UNDER_AUTOCAST = (
    (F, "layer_norm"),
    (torch, "pow"),
    (torch.Tensor, "pow"),
    (torch.Tensor, "__pow__"),
    (torch, "rsqrt"),
    (torch, "exp"),
    (torch, "cumsum"),
    (torch, "sum"),
    (torch.Tensor, "sum"),
)
"""Among the operators that CUDA's autocast casts to float32 and the CPU's does not, those that decoders use."""


class _Attention(torch.autograd.Function):
    """Flash or memory-efficient attention: keeps q, k, v, the output, one float32 per row, and the mask in q's type."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        batch, heads, length, _ = q.shape
        out = torch.empty((batch, length, heads, v.shape[-1]), dtype=q.dtype).transpose(1, 2)
        logsumexp = torch.empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, _, logsumexp, _ = ctx.saved_tensors
        (grad,) = grads
        grad = grad.contiguous()
        # Float32 sums of dq, dO·O per row; dk and dv per query head, summed over groups afterwards.
        accumulated = torch.empty(q.shape, dtype=torch.float32)
        delta = torch.empty_like(logsumexp)
        dq = torch.empty_like(q)
        groups = q.shape[1] // k.shape[1]
        dk, dv = (torch.empty((q.shape[0], q.shape[1], *t.shape[2:]), dtype=t.dtype) for t in (k, v))
        del accumulated, delta
        if groups > 1:
            dk, dv = (t.view(t.shape[0], -1, groups, *t.shape[2:]).sum(2) for t in (dk, dv))
        return dq, dk, dv, None


class _SoftmaxFromHalf(torch.autograd.Function):
    """Softmax.cu with half_to_float: float32 result kept, half-precision gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int) -> torch.Tensor:
        result = torch.empty(x.shape, dtype=torch.float32)
        ctx.save_for_backward(result)
        ctx.dtype = x.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (result,) = ctx.saved_tensors
        return torch.empty(result.shape, dtype=ctx.dtype), None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention by CUDA's fused kernels. Both draw dropout inside the kernel, so it costs no memory."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
    # A single key head is served too (check_batch_size_and_num_heads_dense of torch 2.15, supports_mqa).
    assert enable_gqa or k.shape[1] in (1, q.shape[1]), "no fused kernel takes these heads"
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            # convert_boolean_attn_mask: a new tensor in q's type, by each call
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask, 0.0)
        if attn_mask.shape[-1] % 8:
            # pad_bias: rows are aligned to 16 bytes for the kernel
            attn_mask = F.pad(attn_mask, (0, 8 - attn_mask.shape[-1] % 8))
    return _Attention.apply(q, k, v, attn_mask)  # type: ignore[no-any-return]


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Put the above in the place of torch's own.

    Patches, not a TorchFunctionMode: the autograd engine leaves such modes when it recomputes a checkpointed layer.
    """
    getitem, autocast_enabled = torch.Tensor.__getitem__, torch.is_autocast_enabled
    with ExitStack() as stack:

        def put(owner: Any, name: str, replacement: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, replacement))

        for owner, name in FLOAT32_UNDER_AUTOCAST:
            put(owner, name, in_float32(getattr(owner, name)))
        put(F, "softmax", softmax)
        # Asked without a device this tells of CUDA. peft's Linear4bit does, and takes another path without autocast.
        put(torch, "is_autocast_enabled", lambda device="cpu": autocast_enabled(device))
        put(F, "dropout", dropout)
        put(F, "scaled_dot_product_attention", attention)
        put(torch.Tensor, "__getitem__", lambda x, i: select_all(x, i) if is_mask(i) else getitem(x, i))
        yield


def in_float32(function: Any) -> Any:
    """``function`` as CUDA's autocast runs it."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(to_float32(a) for a in args)
            kwargs = {name: to_float32(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return run


def softmax(x: torch.Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> torch.Tensor:
    """CUDA reads half precision and writes float32 in one kernel; autocast asks for float32 where the caller names no type."""
    if dtype is None:
        dtype = torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype is torch.float32 and x.dtype is not dtype:
        return _SoftmaxFromHalf.apply(x, dim)  # type: ignore[no-any-return]
    return torch.ops.aten._softmax(x.to(dtype), dim, False)  # type: ignore[no-any-return]


def to_float32(value: Any) -> Any:
    """Autocast's cast: half-precision tensors only."""
    if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA's fused dropout keeps one byte per element."""
    if not training or p == 0:
        return x
    return torch.ops.aten.native_dropout(x, p, True)[0]  # type: ignore[no-any-return]


def is_mask(index: Any) -> bool:
    """Whether an index selects by a boolean tensor, whose result has no shape that a fake knows."""
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def select_all(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``x[mask]`` where every element of the mask is true: the positions as integers, then a gather, as on CUDA."""
    positions = tuple(torch.zeros(mask.numel(), dtype=torch.int64) for _ in mask.shape)
    return x[positions]
