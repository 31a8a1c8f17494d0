"""Full weights: the base's own parameters are trained, in float32, and stored by the names that they have in its files."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune_api.failures import Reason
from finetune_api.results import WEIGHTS_FILE, TrainedWeights
from finetune_trainer.errors import StageError
from finetune_trainer.weight_files import weight_files


def train_weights(base: Any, weights: TrainedWeights, folder: Path) -> Any:
    """The base, with these of its parameters to be trained: as they are in its files in ``folder``, not rounded to the type of the products.

    Raises:
        StageError: UnsupportedModel, where a parameter has another name than its tensor in the files.
    """
    parameters = parameters_of(base, weights)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for name, value in stored_values(folder, weights.tensors):
        parameter = parameters[name]
        assert value.shape == parameter.shape, (
            f"{name} is {list(value.shape)} in its file, {list(parameter.shape)} loaded"
        )
        parameter.data = value.to(parameter.device, torch.float32, copy=True)  # the file's mapping is not written to
    return base


def stored_values(folder: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """These tensors of a model's files, one at a time, as they are stored."""
    wanted = set(names)
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as opened:
            for name in wanted.intersection(opened.keys()):
                yield name, opened.get_tensor(name)


def parameters_of(base: Any, weights: TrainedWeights) -> dict[str, torch.nn.Parameter]:
    """By the names in the files."""
    found = dict(base.named_parameters())
    if missing := [name for name in weights.tensors if name not in found]:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"{len(missing)} tensors of the base model's files (such as {missing[0]}) are no parameters of {type(base).__name__} under that "
            "name: use method.type: LoRA.",
        )
    return {name: found[name] for name in weights.tensors}


def trained_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Those that are trained, as they are."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def take_up_weights(model: Any, values: dict[str, torch.Tensor]) -> None:
    """Give a model's trained parameters the values of a file.

    Raises:
        AssertionError: the file has others.
    """
    parameters = trained_parameters(model)
    assert parameters.keys() == values.keys(), f"other tensors: {sorted(parameters.keys() ^ values.keys())[:3]}"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def save_weights(model: Any, tokenizer: Any, folder: Path) -> None:
    """The trained tensors and the tokenizer, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: p.detach().to("cpu").contiguous() for name, p in trained_parameters(model).items()}
    save_file(values, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def load_over(base: Any, folder: Path, weights: TrainedWeights) -> Any:
    """Stored tensors over a base as it was read from disk.

    Raises:
        StageError: VerificationFailed, if the file has not just the tensors that were trained.
    """
    values = load_file(folder / WEIGHTS_FILE)
    if values.keys() != set(weights.tensors):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the file of trained weights in the bucket has {len(values)} tensors; {len(weights.tensors)} were trained.",
        )
    for name, parameter in parameters_of(base, weights).items():
        if values[name].shape != parameter.shape:
            raise StageError(
                Reason.VERIFICATION_FAILED,
                f"{name} is {list(values[name].shape)} in the bucket, and {list(parameter.shape)} in the base.",
            )
        parameter.data = values[name].to(parameter.device)
    return base
