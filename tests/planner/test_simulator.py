"""The simulator measures what it claims to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from tests.planner.simulator.golden import read_config
from tests.planner.simulator.gpu_kernels import cuda_kernels
from tests.planner.simulator.step import Case, simulate
from tests.planner.simulator.tracker import LiveStorages, rounded

TINY = {**read_config("smollm2-135m"), "num_hidden_layers": 2}
CASE = Case("smollm2-135m", False, 128, 1, True)


def test_a_storage_counts_once_until_its_last_view_is_gone() -> None:
    live = LiveStorages()
    with live:
        a = torch.empty(1000)
        view = a[10:20].view(2, 5)
        assert live.live_bytes == rounded(4000) == 4096
        del a
        assert live.live_bytes == 4096
        del view
        assert live.live_bytes == 0
        assert live.peak_bytes == 4096


def test_a_real_backward_pass_frees_what_it_kept() -> None:
    live = LiveStorages()
    with live:
        layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        x = torch.randn(32, 64)
        before = live.live_bytes
        out = layers(x).sum()
        kept = live.live_bytes - before
        assert kept >= 32 * 256 * 4 * 2  # GELU's input and its output, which the second layer multiplies
        out.backward()
        del out
        gradients = sum(rounded(p.numel() * 4) for p in layers.parameters())
        assert live.live_bytes - before == gradients


def test_fakes_take_what_real_tensors_take() -> None:
    """The same model code with real tensors on the CPU, counted by the same tracker."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def peak() -> int:
        live = LiveStorages()
        with live:
            layers = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.LayerNorm(256), nn.Linear(256, 64))
            layers(torch.zeros(32, 64)).square().mean().backward()
        return live.peak_bytes

    real = peak()
    with FakeTensorMode():
        assert peak() == real


def test_dropout_keeps_a_byte_per_element_as_on_cuda() -> None:
    live = LiveStorages()
    x = torch.ones(1024, requires_grad=True)
    with live, cuda_kernels():
        y = F.dropout(x, 0.5, True)
        assert live.live_bytes == 4096 + 1024
        y.sum().backward()


def test_checkpointing_needs_less_and_longer_rows_need_more() -> None:
    checkpointed = simulate(CASE, TINY)
    kept = simulate(replace(CASE, checkpointing=False, sequence_tokens=512), TINY)
    longer = simulate(replace(CASE, sequence_tokens=512), TINY)
    assert checkpointed.step_peak_bytes < longer.step_peak_bytes <= kept.step_peak_bytes
    assert checkpointed.held_bytes == longer.held_bytes


def test_four_bit_bases_hold_about_half_a_byte_per_weight() -> None:
    full, packed = simulate(CASE, TINY), simulate(replace(CASE, quantized=True), TINY)
    head = 2 * TINY["vocab_size"] * TINY["hidden_size"]
    assert (packed.base_bytes - head) / (full.base_bytes - head) < 0.27
    assert packed.adapter_bytes == full.adapter_bytes
