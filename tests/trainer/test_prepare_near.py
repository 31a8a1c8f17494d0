"""Near duplicates: found by their similarity, whatever their order, and kept on one side of the split."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from finetune_trainer.prepare import near as near_module
from finetune_trainer.prepare.near import Hashes, clusters, distinct, joined, shingles, sketch
from tests.support.prepare_bench import REF, Bench, row

WORDS = ["".join(Random(i).choices("abcdefghijklmnop", k=3 + i % 7)) for i in range(3000)]


def text(seed: int, words: int = 80) -> str:
    return " ".join(Random(seed).choices(WORDS, k=words))


def changed(original: str, count: int) -> str:
    words = original.split()
    for position in Random(count).sample(range(len(words)), count):
        words[position] = f"changed{position}"
    return " ".join(words)


def text_shingles(of: str) -> Hashes:
    return shingles([of])[0]


def similarity(first: str, second: str) -> float:
    one, other = set(text_shingles(first).tolist()), set(text_shingles(second).tolist())
    return len(one & other) / len(one | other)


def found(pairs: list[tuple[str, str]], threshold: float) -> list[bool]:
    texts = [t for pair in pairs for t in pair]
    labels = clusters(sketch([text_shingles(t) for t in texts]), np.arange(len(texts), dtype=np.uint64), threshold)
    return (labels[0::2] == labels[1::2]).tolist()


@pytest.mark.parametrize("threshold", [0.65, 0.8, 0.9])
def test_pairs_are_found_above_the_threshold_and_not_far_below_it(threshold: float) -> None:
    pairs = [(text(i), changed(text(i), i % 16)) for i in range(800)]
    hits = found(pairs, threshold)
    measured = [similarity(*pair) for pair in pairs]
    above = [hit for hit, value in zip(hits, measured, strict=True) if value >= min(0.99, threshold + 0.1)]
    below = [hit for hit, value in zip(hits, measured, strict=True) if value < threshold - 0.15]
    assert len(above) > 30 < len(below)
    assert sum(above) >= 0.98 * len(above)
    assert sum(below) <= 0.01 * len(below)


def test_case_white_space_and_punctuation_do_not_count() -> None:
    assert np.array_equal(
        text_shingles("What is  the capital,\nof FRANCE?"), text_shingles("what is the capital of france ")
    )


def test_a_shingle_stands_for_what_it_is_made_of() -> None:
    ids = np.array(Random(0).choices(range(3), k=4000), np.int32)
    names: dict[tuple[int, ...], set[int]] = {}
    for position, value in enumerate(shingles([ids])[0].tolist()):
        names.setdefault(tuple(ids[position : position + 5].tolist()), set()).add(value)
    assert {len(values) for values in names.values()} == {1}
    assert len({v for values in names.values() for v in values}) == len(names) == 3**5


def test_rows_of_a_batch_do_not_touch() -> None:
    rows = [
        "",
        "One, two!",
        text(3),
        " ",
        "ß 東京都 – x",
        np.arange(9, dtype=np.int32),
        text(4),
        np.arange(2, dtype=np.int32),
        "?",
    ]
    for alone, together in zip([shingles([r])[0] for r in rows], shingles(rows), strict=True):
        assert np.array_equal(alone, together)


def test_short_and_empty_rows_are_alike_only_if_they_are_the_same() -> None:
    pairs = [("yes", "no"), ("", "yes"), ("a", "a!"), ("", "?")]
    labels = clusters(sketch([text_shingles(t) for pair in pairs for t in pair]), np.arange(8, dtype=np.uint64), 0.8)
    assert [len(np.unique(labels[i : i + 2])) for i in range(0, 8, 2)] == [2, 2, 1, 1]


def test_the_result_does_not_depend_on_batches_and_rows_order_only_names_clusters() -> None:
    texts = [changed(text(i // 2, 200), 1 + i % 2) for i in range(100)]
    shingles = [text_shingles(t) for t in texts]
    whole = sketch(shingles)
    assert np.array_equal(whole, np.concatenate([sketch(shingles[i : i + 7]) for i in range(0, 100, 7)]))
    contents = np.arange(100, dtype=np.uint64)
    order = np.array(Random(1).sample(range(100), 100))
    labels, moved = clusters(whole, contents, 0.8), clusters(whole[order], contents[order], 0.8)
    assert len(np.unique(labels)) == 50
    same = labels[:, None] == labels[None, :]
    assert np.array_equal(same[np.ix_(order, order)], moved[:, None] == moved[None, :])


def test_rows_that_are_compared_in_parts_are_found_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [changed(text(i // 3), i % 3) for i in range(900)]
    sketches = sketch(shingles(texts))
    contents = np.array([i - (i % 9 == 8) for i in range(900)], np.uint64)  # some rows stand there twice
    whole = clusters(sketches, contents, 0.8)
    monkeypatch.setattr(near_module, "PART_ROWS", 10)
    assert len(list(near_module._parts(sketches[:, 0], np.arange(900, dtype=np.int32)))) == 1 << 7
    assert np.array_equal(clusters(sketches, contents, 0.8), whole)
    assert 290 < len(np.unique(whole)) < 400


@pytest.mark.parametrize("values", [[], [7], [3, 1, 3, 2, 1, 1]])
def test_distinct_values_are_those_of_numpy(values: list[int]) -> None:
    array = np.array(values, np.uint64)
    _, first, inverse = np.unique(array, return_index=True, return_inverse=True)
    found = distinct(array)
    assert (found[0].tolist(), found[1].tolist()) == (first.tolist(), inverse.tolist())


def test_groups_that_hang_together_by_way_of_others_become_one() -> None:
    groups = np.array([9, 9, 5, 5, 7, 3], np.uint64)
    labels = np.array([0, 1, 1, 3, 3, 5])
    assert joined(groups, labels).tolist() == [5, 5, 5, 5, 5, 3]


def near(seed: int, count: int) -> dict[str, object]:
    return row(changed(text(seed), count), text(seed + 1000))


def test_near_duplicates_are_counted_and_stand_on_one_side_of_the_split(bench: Bench) -> None:
    bench.put([near(i // 2, i % 2) for i in range(200)])
    report = bench.run(data={"heldOut": {"fraction": 0.3}})
    sides = {side: {number // 2 for number in bench.table(side)["row"].to_pylist()} for side in ("train", "held_out")}
    assert not sides["train"] & sides["held_out"]
    assert (report.data.near_duplicate_rows, report.data.held_out_near_rows) == (70, 0)
    assert (report.data.held_out_rows, report.data.duplicate_rows) == (60, 0)
    assert any("70 training rows nearly the same as another one" in w for w in report.warnings)

    alone = bench.run(data={"heldOut": {"fraction": 0.3}, "checks": {"nearDuplicates": {"enabled": False}}})
    sides = {side: {number // 2 for number in bench.table(side)["row"].to_pylist()} for side in ("train", "held_out")}
    assert len(sides["train"] & sides["held_out"]) > 10, "as they would stand otherwise"
    assert (alone.data.near_duplicate_rows, alone.data.held_out_near_rows) == (0, 0)


def test_held_out_sources_that_nearly_stand_in_training_are_told_of(bench: Bench) -> None:
    bench.put([near(i, 0) for i in range(120)])
    bench.put([*(near(i, 2) for i in range(4)), near(5, 0), *(near(i, 0) for i in range(500, 540))], "held.jsonl")
    report = bench.run(data={"heldOut": {"sources": [{"uri": f"s3://{bench.bucket}/held.jsonl", **REF}]}})
    assert (report.data.held_out_near_rows, report.data.near_duplicate_rows) == (4, 0)
    assert any(
        "4 held-out rows nearly the same as a training row: the held-out loss is too good" in w for w in report.warnings
    )


def test_where_all_rows_are_made_from_one_template_prompts_are_split_and_the_leak_is_told(bench: Bench) -> None:
    frame = text(1, 200)
    bench.put([row(f"{frame} {i}", f"Answer {i}.") for i in range(150)])
    report = bench.run()
    assert report.data.held_out_rows == report.data.held_out_near_rows == 15
    assert any("15 held-out rows nearly the same" in w for w in report.warnings)
