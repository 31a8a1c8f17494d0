"""The demo's dataset: real, and nothing held out stands in train."""

import json
from pathlib import Path

from demo import dataset


def answers(file: Path) -> list[str]:
    return [json.loads(line)["messages"][-1]["content"] for line in file.read_text().splitlines()]


def test_no_held_out_answer_stands_in_train_nor_one_that_is_nearly_the_same(tmp_path: Path) -> None:
    report = dataset.build(tmp_path)
    train, held_out = answers(tmp_path / "train.jsonl"), answers(tmp_path / "held_out.jsonl")
    assert (len(train), len(held_out)) == (report.train_rows, report.held_out_rows) == (480, 48)
    grams = [dataset.trigrams(answer) for answer in train]
    nearest = max(dataset.similarity(dataset.trigrams(answer), other) for answer in held_out for other in grams)
    assert nearest < dataset.NEAR_DUPLICATE
    assert report.highest_similarity == nearest, "what the demo reports"
    assert len(set(train + held_out)) == len(train + held_out)
    assert report.exact_overlap == 0
    assert report.near_duplicates > 100, "the documentation does repeat itself"


def test_the_same_documentation_gives_the_same_bytes(tmp_path: Path) -> None:
    dataset.build(tmp_path / "a")
    dataset.build(tmp_path / "b")
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
