"""What the API server last told: FineTuneJobs and AdapterCombinations by key, and their Jobs and pods by the owner's UID.

Filled by watch events, by the answers to our own writes (so that a reconcile sees what it wrote before the watch tells)
and by a periodic list. An older version never replaces a newer one, and what is gone never comes back: a list that began
before a deletion may be read after it was told.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from finetune_api import KIND
from finetune_operator.combinations.observe import CachedCombination, trim_combination
from finetune_operator.observe import CachedJob, Raw, finetunejob_uid, trim_finetunejob, trim_job, trim_pod, version_of
from finetune_operator.planning.model import Pod, StageJob

REMEMBERED_DELETIONS = 20_000
REMEMBERED_PODS = 8
"""Of a FineTuneJob; one or two between two looks at it are usual."""


class Key(NamedTuple):
    """Namespace and name of a FineTuneJob, or of an AdapterCombination."""

    namespace: str
    name: str
    kind: str = KIND

    def __str__(self) -> str:
        place = f"{self.namespace}/{self.name}"
        return place if self.kind == KIND else f"{self.kind} {place}"


@dataclass
class Family:
    """The children of one FineTuneJob, by name."""

    jobs: dict[str, StageJob] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    gone: dict[str, Pod] = field(default_factory=dict)
    """By UID, the last ones that are gone, as they ended: a drained pod goes as soon as it has."""


class Cache:
    """In-memory state. Every method is synchronous, so the event loop makes it atomic."""

    def __init__(self) -> None:
        self.jobs: dict[Key, CachedJob] = {}
        self.combinations: dict[Key, CachedCombination] = {}
        self.families: dict[str, Family] = {}
        self._keys: dict[str, Key] = {}
        self._gone: OrderedDict[str, None] = OrderedDict()

    def family(self, uid: str) -> Family:
        """The children of a FineTuneJob; empty when there are none."""
        return self.families.get(uid) or Family()

    def key_of(self, uid: str) -> Key | None:
        """What has a UID."""
        return self._keys.get(uid)

    def of(self, key: Key) -> CachedJob | CachedCombination | None:
        """What stands under a key, of either kind."""
        return self.jobs.get(key) if key.kind == KIND else self.combinations.get(key)

    def put(self, kind: str, raw: Raw) -> Key | None:
        """Remember a FineTuneJob or an AdapterCombination; its key if that was news."""
        meta = raw["metadata"]
        key = Key(meta["namespace"], meta["name"], kind)
        known = self.of(key)
        if meta["uid"] in self._gone or (known is not None and known.resource_version >= version_of(meta) > 0):
            return None
        if known is not None and known.uid != meta["uid"]:
            self._forget(known.uid)
        if kind == KIND:
            self.jobs[key] = trim_finetunejob(raw, self.jobs.get(key))
        else:
            self.combinations[key] = trim_combination(raw)
        self._keys[meta["uid"]] = key
        return key

    def drop(self, key: Key, uid: str) -> bool:
        """Forget one that is gone, unless another has taken its name."""
        self._bury(uid)
        known = self.of(key)
        if known is None or known.uid != uid:
            return False
        if key.kind == KIND:
            del self.jobs[key]
        else:
            del self.combinations[key]
        self._forget(uid)
        return True

    def _bury(self, uid: str) -> None:
        self._gone[uid] = None
        self._gone.move_to_end(uid)
        while len(self._gone) > REMEMBERED_DELETIONS:
            self._gone.popitem(last=False)

    def _forget(self, uid: str) -> None:
        self._bury(uid)
        self._keys.pop(uid, None)
        self.families.pop(uid, None)

    def put_job(self, raw: Raw) -> str | None:
        """Remember a Job; the owner's UID if that was news."""
        job = trim_job(raw)
        uid = finetunejob_uid(raw)
        if job is None or not uid or uid in self._gone or job.uid in self._gone:
            return None
        known = self.families.setdefault(uid, Family()).jobs
        old = known.get(job.name)
        if old is not None and old.resource_version >= job.resource_version > 0:
            return None
        known[job.name] = job
        return uid

    def put_pod(self, raw: Raw) -> str | None:
        """Remember a pod; the owner's UID if that was news."""
        pod = trim_pod(raw)
        uid = finetunejob_uid(raw)
        if pod is None or not uid or uid in self._gone or pod.uid in self._gone:
            return None
        known = self.families.setdefault(uid, Family()).pods
        old = known.get(pod.name)
        if old is not None and old.resource_version >= pod.resource_version > 0:
            return None
        known[pod.name] = pod
        return uid

    def forget_job(self, owner: str, name: str, uid: str) -> None:
        """Forget a Job by name, if it is still that one. If it exists after all, the next event brings it back."""
        family = self.families.get(owner)
        if family is not None and name in family.jobs and family.jobs[name].uid == uid:
            del family.jobs[name]

    def drop_job(self, raw: Raw) -> str | None:
        """Forget a Job that is gone."""
        return self._drop(raw, "jobs")

    def drop_pod(self, raw: Raw) -> str | None:
        """Forget a pod that is gone, but for how it ended."""
        owner, pod = self._drop(raw, "pods"), trim_pod(raw)
        if owner is not None and pod is not None and pod.ended and pod.counts:
            gone = self.families.setdefault(owner, Family()).gone
            gone[pod.uid] = pod
            while len(gone) > REMEMBERED_PODS:
                del gone[next(iter(gone))]
        return owner

    def _drop(self, raw: Raw, kind: str) -> str | None:
        self._bury(raw["metadata"]["uid"])
        uid = finetunejob_uid(raw)
        family = self.families.get(uid)
        if family is None:
            return None
        members: dict[str, StageJob] | dict[str, Pod] = family.jobs if kind == "jobs" else family.pods
        old = members.get(raw["metadata"]["name"])
        if old is None or old.uid != raw["metadata"]["uid"]:
            return None
        del members[old.name]
        if not family.jobs and not family.pods and not family.gone:
            del self.families[uid]
        return uid

    def drop_children(self, kind: str, seen: set[str], version: int, namespace: str | None) -> list[Key]:
        """Forget Jobs or pods that a list at ``version`` did not hold; the keys that lost something."""
        changed = []
        for owner, family in list(self.families.items()):
            key = self._keys.get(owner)
            if key is None or (namespace is not None and key.namespace != namespace):
                continue
            members: dict[str, StageJob] | dict[str, Pod] = family.jobs if kind == "jobs" else family.pods
            gone = [n for n, m in members.items() if m.uid not in seen and m.resource_version <= version]
            for name in gone:
                self._bury(members[name].uid)
                del members[name]
            if gone:
                changed.append(key)
            if not family.jobs and not family.pods and not family.gone:
                del self.families[owner]
        return changed
