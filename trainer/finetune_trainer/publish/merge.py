"""Base + adapter → merged model folder, a few rows of one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune_api.failures import Reason
from finetune_api.results import WEIGHTS_FILE, FileRecord
from finetune_trainer.errors import StageError
from finetune_trainer.lora_files import CONFIG, WEIGHTS
from finetune_trainer.prepare.trained_tokens import resized_config
from finetune_trainer.publish.adapter import Adapter
from finetune_trainer.publish.round_trip import RoundTrip
from finetune_trainer.publish.safetensors_stream import (
    CODES,
    Checkpoint,
    StreamWriter,
    TensorInfo,
    element_size,
    module_of,
    read_header,
    rows_per_chunk,
)
from finetune_trainer.publish.tokens import grown, with_rows
from finetune_trainer.weight_files import INDEX

NOT_COPIED = {CONFIG, WEIGHTS, WEIGHTS_FILE, "README.md"}


class BaseWeights:
    """The base weights to merge into: as published, or for QLoRA as training saw them.

    Args:
        round_trip: by the names of the files.
        conv1d: modules, by the names of the files, whose weights are stored (inputs, outputs).
    """

    def __init__(
        self, checkpoint: Checkpoint, round_trip: RoundTrip | None, conv1d: Collection[str] = frozenset()
    ) -> None:
        self.checkpoint = checkpoint
        self._round_trip = round_trip
        self._conv1d = conv1d

    def is_turned(self, name: str) -> bool:
        """Whether a tensor is stored (inputs, outputs)."""
        return name.endswith(".weight") and module_of(name) in self._conv1d

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, as it is stored."""
        value = self.checkpoint.read(name)
        if self._round_trip is None or not self._quantized(name):
            return value
        # transformers (5.23, Bnb4bitQuantize) turns Conv1D's weights before they are quantized.
        module = module_of(name)
        return self._round_trip(module, value.T).T if self.is_turned(name) else self._round_trip(module, value)

    def rows(self, name: str) -> Any:
        """A tensor in parts: (first row, rows). A quantized one is held whole, as its constants depend on all of it."""
        if not self._quantized(name):
            return self.checkpoint.read_rows(name)
        value = self.read(name)
        step = rows_per_chunk(tuple(value.shape))
        return ((start, value[start : start + step]) for start in range(0, len(value), step))

    def _quantized(self, name: str) -> bool:
        return self._round_trip is not None and name.endswith(".weight") and module_of(name) in self._round_trip.modules


def merge(
    base: BaseWeights, adapter: Adapter, dtype: torch.dtype, folder: Path, on_bytes: Callable[[int], None]
) -> list[FileRecord]:
    """Write the merged weights into ``folder``, sharded as the base is. Floats become ``dtype``; W' = cast(float32(W) + scaling·B·A), with
    DoRA each row of the sum at its magnitude.

    Raises:
        StageError: UnsupportedModel, if no tensor of the adapter fits the base; VerificationFailed, if one is left over.
    """
    tensors = base.checkpoint.tensors
    whole = adapter.replaced | adapter.tokens.keys()
    fitting = {m for m in adapter.modules if f"{m}.weight" in tensors} | {n for n in whole if n in tensors}
    left = {n for n in (adapter.modules.keys() | whole) - fitting if not adapter.repeats(n, fitting)}
    if not fitting:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"none of the adapter's modules (such as {min(adapter.modules or adapter.replaced)}) is named so in the base model's files "
            f"(such as {min(tensors)}): this model cannot be merged.",
        )
    if left:
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{len(left)} tensors of the adapter fit nothing in the base: {', '.join(sorted(left)[:3])}.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for file in base.checkpoint.files:
        # Widest elements first keeps every tensor aligned.
        mine = [target(grown(t, adapter.tokens.get(t.name, ())), dtype) for t in tensors.values() if t.file == file]
        mine.sort(key=lambda t: -element_size(t))
        with StreamWriter(folder / file, mine) as writer:
            for info in mine:
                for part in merged_parts(base, adapter, info):
                    on_bytes(writer.write(part))
            records.append(writer.record(file))
    return records


def target(info: TensorInfo, dtype: torch.dtype) -> TensorInfo:
    """The tensor as it will be written."""
    return info if info.dtype is None else replace(info, code=CODES[dtype])


def merged_parts(base: BaseWeights, adapter: Adapter, info: TensorInfo) -> Any:
    """The merged tensor, a few rows at a time, in the type of ``info``."""
    dtype = info.dtype
    if dtype is None:
        yield base.checkpoint.read(info.name)
    elif info.name in adapter.replaced:
        for _, rows in adapter.replaced_rows(info.name):
            yield rows.to(dtype)
    elif info.name in adapter.tokens:
        for _, rows in with_rows(base.rows(info.name), adapter.tokens[info.name], adapter.token_rows(info.name)):
            yield rows.to(dtype)
    elif info.name.endswith(".weight") and module_of(info.name) in adapter.modules:
        lora, turned = adapter.lora(module_of(info.name)), base.is_turned(info.name)
        update = (lora.b.shape[0], lora.a.shape[1])
        if update != (info.shape[::-1] if turned else info.shape):
            raise StageError(
                Reason.VERIFICATION_FAILED,
                f"{info.name} is {list(info.shape)} in the base; the adapter's update is {list(update)}.",
            )
        if turned:
            yield lora.merged(base.read(info.name).T).T.to(dtype)
            return
        for start, rows in base.rows(info.name):
            yield lora.rows(start, len(rows)).merged(rows).to(dtype)
    else:
        for _, rows in base.rows(info.name):
            yield rows.to(dtype)


def write_companions(
    base_folder: Path,
    base_names: list[str],
    adapter_folder: Path,
    dtype: torch.dtype,
    folder: Path,
    vocabulary: int | None = None,
) -> None:
    """What a model folder needs beside weights: configuration and code of the base, tokenizer and template of the adapter.

    Args:
        vocabulary: rows of the embeddings, where they were resized.
    """
    weights = {name for name in base_names if name.endswith(".safetensors")}
    for name in base_names:
        if name not in weights and name not in ("config.json", INDEX):
            shutil.copyfile(base_folder / name, folder / name)
    for path in sorted(adapter_folder.iterdir()):
        if path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((base_folder / "config.json").read_text())
    if vocabulary is not None:
        config = resized_config(config, vocabulary)
    (folder / "config.json").write_text(json.dumps(merged_config(config, dtype), indent=2) + "\n")
    if (base_folder / INDEX).exists() and INDEX in base_names:
        write_index(base_folder, folder)


def merged_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The base's configuration with the merged type, under the key it already has, and nothing left of a quantization."""
    name = str(dtype).removeprefix("torch.")
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    for key, value in config.items():
        if isinstance(value, dict) and {"dtype", "torch_dtype"} & set(value):
            config[key] = merged_config(value, dtype)
    keys = {"dtype", "torch_dtype"} & set(config) or {"dtype"}
    return {**config, **dict.fromkeys(sorted(keys), name)}


def write_index(base_folder: Path, folder: Path) -> None:
    """The base's index with the merged files' true size in bytes (of tensors, without headers)."""
    index = json.loads((base_folder / INDEX).read_text())
    headers = [read_header(folder / file) for file in set(index["weight_map"].values())]
    total = sum(e["data_offsets"][1] - e["data_offsets"][0] for header in headers for e in header.values())
    index["metadata"] = {**index.get("metadata", {}), "total_size": total}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
