"""A base in 8 bit: what is held, what is multiplied, and what is kept for the backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from finetune_trainer.train import evaluate, model
from finetune_trainer.train.int8 import Int8Linear, Product, dequantized, quantized
from tests.trainer.test_train_trainer import CPU16, rows_of, snapshot

INT8 = {"type": "QLoRA", "quantization": {"type": "Int8"}}


def test_products_and_gradients_are_those_of_the_dequantized_weight() -> None:
    torch.manual_seed(0)
    codes, scales = quantized(torch.randn(24, 16))
    x, bias = torch.randn(3, 5, 16, requires_grad=True), torch.randn(24)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        found = Product.apply(x, codes, scales, bias)
    assert [t.data_ptr() for t in kept] == [codes.data_ptr(), scales.data_ptr()], "no input, and no weight in 16 bit"
    weight = codes.float() * scales[:, None] / 127
    wanted = F.linear(x, weight, bias)
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.square().sum(), x)[0])


def test_codes_are_within_half_a_step_of_the_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64).half().float()
    codes, scales = quantized(weight)
    assert torch.equal(scales, weight.abs().amax(dim=1))
    step = scales[:, None] / 127
    assert ((dequantized(codes, scales, torch.float32) - weight).abs() <= 0.501 * step).all()


def test_a_row_of_zeros_stays_one() -> None:
    codes, scales = quantized(torch.zeros(2, 8))
    assert not dequantized(codes, scales, torch.bfloat16).any()


def test_the_base_is_that_of_the_same_weights_in_16_bit(tiny_model: Path) -> None:
    """Not of bitsandbytes' product, which rounds the inputs too: the loss is the one that a merged model has."""
    rows = rows_of(tiny_model, 12)
    held = model.load_base(tiny_model, snapshot(method=INT8), CPU16)
    layers = {n: m for n, m in held.named_modules() if isinstance(m, Linear8bitLt)}
    assert len(layers) == 14
    assert {type(layer) for layer in layers.values()} == {Int8Linear}
    assert {layer.weight.dtype for layer in layers.values()} == {torch.int8}
    loss = evaluate.held_out_loss(held, rows, 0, CPU16).loss
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    original = evaluate.held_out_loss(plain, rows, 0, CPU16).loss
    for name, layer in layers.items():
        weight = (layer.weight * (layer.scales / 127)[:, None]).bfloat16()
        plain.get_submodule(name).weight.data = weight
    assert loss == pytest.approx(evaluate.held_out_loss(plain, rows, 0, CPU16).loss, rel=1e-6)
    assert loss != original
    assert loss == pytest.approx(original, rel=0.01)


def test_gpt2s_layers_are_turned(tmp_path: Path) -> None:
    """They are stored the other way round (Conv1D)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    whole = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    whole.eval().save_pretrained(tmp_path)
    held = model.load_base(tmp_path, snapshot(method=INT8), CPU16)
    ids = torch.arange(20)[None]
    with CPU16.autocast():
        found, wanted = held(ids).logits.float(), whole(ids).logits.float()
    assert held.transformer.h[0].attn.c_attn.weight.shape == (48, 16)
    assert torch.linalg.norm(found - wanted) < 0.05 * torch.linalg.norm(wanted)
