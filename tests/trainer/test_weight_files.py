"""Whoever reads a folder that has one file of weights and an index of others reads the one file, which is what was downloaded."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune_trainer.prepare.singular import StoredMatrices
from finetune_trainer.publish.safetensors_stream import Checkpoint
from finetune_trainer.train.sharded import Stored
from finetune_trainer.weight_files import INDEX, SINGLE, weight_files


def test_the_one_file_comes_before_the_index(tmp_path: Path) -> None:
    value = torch.arange(6.0).reshape(2, 3)
    save_file({"a": value}, tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert StoredMatrices(tmp_path).read("a").tolist() == value.tolist()
    assert torch.equal(Checkpoint(tmp_path).read("a"), value)
    with ExitStack() as opened:
        assert torch.equal(Stored(tmp_path, opened).read("a"), value)


def test_without_it_those_of_the_index_are_read_once_each(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "2", "b": "1", "c": "2"}}))
    assert weight_files(tmp_path) == ["1", "2"]
