"""The proof: what lies in the bucket, loaded freshly over the base, behaves as what was trained."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from finetune_api.failures import GPU_PATIENCE_SECONDS, Reason
from finetune_api.results import FileRecord, PreparedPrompt, PrepareResult, Verification
from finetune_trainer.context import StageContext
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.lora_files import CONFIG, WEIGHTS, tensor_name
from finetune_trainer.prepare.chat import ChatRenderer, chat_template
from finetune_trainer.prepare.tokenizer_files import tokenizer_hash
from finetune_trainer.publish.adapter import token_indices
from finetune_trainer.s3 import S3Store
from finetune_trainer.train.inputs import must_equal
from finetune_trainer.train.model import SAVED, take_up
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest relative difference of held-out losses. On one device the two are computed alike: 0 was measured on CPU, LoRA and QLoRA."""


def fetch_back(ctx: StageContext, store: S3Store, records: Sequence[FileRecord], prefix: str, folder: Path) -> Path:
    """What was stored below ``prefix``, from the bucket, each file with the hash it was written with, in a fresh folder.

    Raises:
        StageError: VerificationFailed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for record in records:
        path = folder / record.path.removeprefix(f"{prefix}/")
        try:
            download = partial(store.download_file, record.path, path, ctx.reporter.transfer("download", record.size))
            found = wait_until_available(ctx, download, limit_seconds=GPU_PATIENCE_SECONDS)
        except NotFound as error:
            raise StageError(
                Reason.VERIFICATION_FAILED, f"{store.uri(record.path)} was uploaded and is not there."
            ) from error
        must_equal(found, record, store.uri(record.path))
    return folder


def load_freshly(base: Any, folder: Path) -> PeftModel:
    """The adapter over the bare base.

    peft fills weights that the file lacks with fresh ones and warns at most, so the file's tensors are counted.

    Raises:
        StageError: VerificationFailed.
    """
    must_be_whole(folder)
    model = PeftModel.from_pretrained(base, folder, is_trainable=False)
    saved = [p for n, p in model.named_parameters() if SAVED in n]
    for parameter in saved:
        # peft makes these copies in the base's type.
        parameter.data = parameter.data.float()
    if saved:
        take_up(model, load_file(folder / WEIGHTS))
    wanted = len(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / WEIGHTS, "pt") as file:
        found = len(file.keys())
    if wanted != found:
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the adapter in the bucket has {found} tensors; its configuration needs {wanted}.",
        )
    return model


def must_be_whole(folder: Path) -> None:
    """The file has a row for each trained token: peft fails with a KeyError where an embedding's are missing.

    Raises:
        StageError: VerificationFailed.
    """
    with safe_open(folder / WEIGHTS, "pt") as file:
        keys = {tensor_name(key): key for key in file.keys()}  # noqa: SIM118 - not a dict
    token_indices(folder, json.loads((folder / CONFIG).read_text()), keys)


def check_tokenizer_files(tokenizer: Any, files: Sequence[FileRecord], prepared: PrepareResult) -> str:
    """The hash over the tokenizer's files and template, which must be the prepare stage's.

    Raises:
        StageError: VerificationFailed.
    """
    new = prepared.trained_tokens.new if prepared.trained_tokens is not None else []
    found = tokenizer_hash({f.path: f.sha256 for f in files}, chat_template(tokenizer), new)
    if found != prepared.tokenizer_hash:
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the tokenizer or its chat template is not the one that prepared the data: hash {found[:16]}…, "
            f"expected {prepared.tokenizer_hash[:16]}….",
        )
    return found


def check_tokenizer(tokenizer: Any, prompts: Sequence[PreparedPrompt]) -> None:
    """The tokenizer and chat template make of each prompt the ids that prepare made.

    Raises:
        StageError: VerificationFailed.
    """
    template = chat_template(tokenizer)
    renderer = ChatRenderer(tokenizer, template) if template else None
    for prompt in (p for p in prompts if not p.from_tokens):
        text = prompt.text
        if prompt.messages is not None:
            # Through the same renderer as prepare's: it freezes templates that write today's date.
            text = renderer.question(prompt.messages, prompt.tools or ()) if renderer else ""
        ids = tokenizer(text, add_special_tokens=prompt.messages is None)["input_ids"]
        if text != prompt.text or list(ids) != prompt.input_ids:
            raise StageError(
                Reason.VERIFICATION_FAILED,
                f"the stored tokenizer reads the prompt of held-out row {prompt.row} differently from the one "
                f"that prepared the data ({len(ids)} tokens, {len(prompt.input_ids)} expected).",
            )


def compare(trained: float, reloaded: float) -> Verification:
    """Relative difference of the two held-out losses, judged.

    Raises:
        StageError: VerificationFailed.
    """
    difference = abs(reloaded - trained) / max(abs(trained), 1e-9)
    if not difference <= TOLERANCE:  # also for NaN
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"what was read back from the bucket has held-out loss {reloaded:.4f}; the trained model has {trained:.4f} "
            f"(relative difference {difference:.2g}, allowed {TOLERANCE:g}).",
        )
    return Verification(
        held_out_loss_trained=trained,
        held_out_loss_reloaded=reloaded,
        relative_difference=difference,
        tolerance=TOLERANCE,
    )
