"""The simulator measures what it claims to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.planner.simulator.golden import read_config
from tests.planner.simulator.gpu_kernels import cuda_kernels
from tests.planner.simulator.step import Case, simulate
from tests.planner.simulator.tracker import LiveStorages, rounded

TINY = {
    **read_config("smollm2-135m"),
    "num_hidden_layers": 2,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
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


@pytest.mark.parametrize("quantized", [{}, {"quantized": True}, {"quantized": True, "eight_bit": True}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fakes_take_to_the_byte_what_real_tensors_take(quantized: dict[str, bool], checkpointing: bool) -> None:
    """The same steps with real tensors on the CPU, counted by the same tracker."""
    case = replace(CASE, **quantized, checkpointing=checkpointing, micro_batch_sequences=2)
    assert simulate(case, TINY, 256, fake=False) == simulate(case, TINY, 256)


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


def test_four_bit_bases_hold_a_little_over_a_quarter() -> None:
    full, packed = simulate(CASE, TINY), simulate(replace(CASE, quantized=True), TINY)
    head = 2 * TINY["vocab_size"] * TINY["hidden_size"]
    assert (packed.base_bytes - head) / (full.base_bytes - head) < 0.3
    assert packed.adapter_bytes == full.adapter_bytes
