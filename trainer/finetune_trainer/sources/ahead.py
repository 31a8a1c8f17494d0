"""The base model is brought into the cache before training asks for it, on a CPU."""

from __future__ import annotations

from finetune_api.spec import CacheFetch
from finetune_trainer.context import StageContext
from finetune_trainer.sources.cache import cache_of
from finetune_trainer.sources.model import resolve_model
from finetune_trainer.waiting import wait_until_available


def fetch_ahead(ctx: StageContext, commit: str | None) -> bool:
    """Whether the base is in the cache now. Where there is none that can hold it, training fetches it itself."""
    cache = cache_of(ctx)
    if cache is None:
        return False
    ctx.reporter.report(activity="Downloading")

    def fetch() -> bool:
        source = resolve_model(ctx, commit)
        moved = ctx.reporter.transfer("download", sum(f.size for f in source.list_files()))
        return cache.fetch(source, moved) is not None

    return wait_until_available(ctx, fetch)


def fetch_or_leave(ctx: StageContext, commit: str | None) -> bool:
    """Fetch the base, or leave that to the time in which the training Job waits in its queue.

    Returns:
        whether it is left, and not in the cache already.
    """
    spec = ctx.snapshot.spec
    cache, settings = cache_of(ctx), spec.model.cache
    if cache is None or settings is None:
        return False
    if spec.queue.name is None or settings.fetch is CacheFetch.BEFORE_QUEUE:
        fetch_ahead(ctx, commit)
        return False
    return not wait_until_available(ctx, lambda: cache.holds(resolve_model(ctx, commit)))
