"""The cache: events, answers and lists in any order end in what is."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api import KIND
from finetune_api.names import LABEL_STAGE, LABEL_UID
from finetune_operator import cache as module
from finetune_operator.cache import Cache, Key

Raw = dict[str, Any]
KEY = Key("ns", "a")


def finetunejob(uid: str = "owner", version: int = 1) -> Raw:
    return {"metadata": {"namespace": "ns", "name": "a", "uid": uid, "resourceVersion": str(version)}}


def child(uid: str = "child", version: int = 1, owner: str = "owner") -> Raw:
    return {
        "metadata": {
            "namespace": "ns",
            "name": "x",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {LABEL_UID: owner, LABEL_STAGE: "train"},
            "ownerReferences": [{"uid": owner, "controller": True}],
        }
    }


def test_an_older_version_never_replaces_a_newer_one() -> None:
    cache = Cache()
    assert cache.put(KIND, finetunejob(version=5)) == KEY
    assert cache.put(KIND, finetunejob(version=4)) is None
    assert cache.put_pod(child(version=5)) == "owner"
    assert cache.put_pod(child(version=4)) is None


def test_what_was_deleted_while_a_list_was_read_is_not_brought_back_by_it() -> None:
    cache = Cache()
    listed = finetunejob(), child("job"), child("pod")
    cache.put(KIND, listed[0])
    cache.put_job(listed[1])
    cache.put_pod(listed[2])
    cache.drop_job(child("job", 7))
    cache.drop_pod(child("pod", 8))
    assert cache.put_job(listed[1]) is None
    assert cache.put_pod(listed[2]) is None
    cache.drop(KEY, "owner")
    assert cache.put(KIND, listed[0]) is None
    assert cache.jobs == {}
    assert cache.families == {}


def test_how_the_last_pods_ended_is_kept_when_they_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED_PODS", 2)
    cache = Cache()
    cache.put(KIND, finetunejob())
    for number in range(3):
        pod = child(f"pod-{number}")
        cache.put_pod(pod)
        cache.drop_pod({**pod, "status": {"phase": "Failed"}})
    cache.put_pod(child("killed"))
    cache.drop_pod({**child("killed"), "status": {"phase": "Running"}})
    family = cache.family("owner")
    assert family.pods == {}
    assert list(family.gone) == ["pod-1", "pod-2"], "and not one that never told how it ended"
    cache.drop(KEY, "owner")
    assert cache.families == {}


def test_a_deletion_counts_even_where_the_object_was_never_seen() -> None:
    cache = Cache()
    cache.drop_pod(child("pod", 8))
    assert cache.put_pod(child("pod", 3)) is None


def test_children_of_a_job_that_is_gone_leave_nothing_behind() -> None:
    cache = Cache()
    cache.put(KIND, finetunejob())
    cache.drop(KEY, "owner")
    assert cache.put_pod(child("late")) is None
    assert cache.families == {}


def test_another_object_of_the_same_name_is_another_object() -> None:
    cache = Cache()
    cache.put(KIND, finetunejob("first", 1))
    assert cache.put(KIND, finetunejob("second", 2)) == KEY
    assert cache.put(KIND, finetunejob("first", 3)) is None, "its successor proves that it is gone"
    assert cache.jobs[KEY].uid == "second"


def test_what_a_list_no_longer_holds_is_gone() -> None:
    cache = Cache()
    cache.put(KIND, finetunejob())
    cache.put_job(child("old", 3))
    assert cache.drop_children("jobs", set(), 5, None) == [KEY]
    assert cache.put_job(child("old", 3)) is None


def test_memory_of_deletions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED_DELETIONS", 2)
    cache = Cache()
    for uid in ("a", "b", "c"):
        cache.drop_pod(child(uid))
    assert cache.put_pod(child("c")) is None
    assert cache.put_pod(child("a")) == "owner"
