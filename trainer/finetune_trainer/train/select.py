"""Which weights become the result: the last step's, or the best ones that were evaluated on the way."""

from __future__ import annotations

import logging
from functools import partial

from finetune_api.results import CheckpointMarker
from finetune_api.spec import Selection
from finetune_trainer.train.checkpoints import folder_name
from finetune_trainer.train.evaluate import HeldOutLoss
from finetune_trainer.train.fit import Fit

log = logging.getLogger(__name__)


def evaluate_and_select(fit: Fit) -> tuple[HeldOutLoss, int | None]:
    """Measure the last step's weights; where an earlier step's were better and may be chosen, put those into the model and measure
    them again. The second value is that step."""
    last, total = fit.evaluate(), fit.last_step
    fit.history.evaluations = [*(e for e in fit.history.evaluations if e["step"] != total), last.line(total)]
    if fit.ctx.snapshot.spec.output.select is Selection.LAST:
        return last, None
    while (best := fit.ranks.share(fit.checkpoints.best)) is not None and better(best, last.loss, total):
        restore = partial(fit.checkpoints.restore, folder_name(best.step, best.execution_id), best)
        restored = fit.here(fit.ranks.share(partial(fit.patiently, restore)))
        if restored is not None:
            log.info(
                "step %d was better (held-out loss %.4f) than the last (%.4f)", best.step, best.held_out_loss, last.loss
            )
            fit.load(restored)
            return fit.evaluate(), best.step
        log.warning("the best weights, of step %d, are lost with their checkpoint: the next best are taken", best.step)
    return last, None


def better(marker: CheckpointMarker, last_loss: float, last_step: int) -> bool:
    """Whether a checkpoint's weights are better than the last ones."""
    return marker.step != last_step and marker.held_out_loss is not None and marker.held_out_loss < last_loss
