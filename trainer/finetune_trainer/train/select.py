"""Which weights become the result: the last step's, or the best ones that were evaluated on the way."""

from __future__ import annotations

import logging

from finetune_api.spec import Selection
from finetune_trainer.train.checkpoints import folder_name
from finetune_trainer.train.evaluate import HeldOutLoss
from finetune_trainer.train.fit import Fit, load_adapter

log = logging.getLogger(__name__)


def evaluate_and_select(fit: Fit) -> tuple[HeldOutLoss, int | None]:
    """Measure the last step's weights; where an earlier step's were better and may be chosen, put those into the model and measure
    them again. The second value is that step."""
    last, total = fit.evaluate(), fit.schedule.steps
    fit.history.evaluations.append({"step": total, "held_out_loss": last.loss})
    best = fit.checkpoints.best()
    if fit.ctx.snapshot.spec.output.select is Selection.LAST or best is None or best.held_out_loss is None:
        return last, None
    if best.step == total or best.held_out_loss >= last.loss:
        return last, None
    restored = fit.checkpoints.restore(folder_name(best.step, best.execution_id), best)
    if restored is None:
        log.warning("the best weights, of step %d, are lost with their checkpoint: the last ones are taken", best.step)
        return last, None
    log.info("step %d was better (held-out loss %.4f) than the last (%.4f)", best.step, best.held_out_loss, last.loss)
    load_adapter(fit.model, restored)
    return fit.evaluate(), best.step
