"""``python -m finetune_trainer prepare|train|publish|fetch|cleanup|combine``: run a stage and tell how it ended, in every way there is.

Exit code, termination message and final post all carry the same reason; any one of them may be lost.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel, ValidationError

from finetune_api.failures import FAILURES, Reason
from finetune_api.names import Stage
from finetune_api.progress import StageReport
from finetune_trainer import heartbeat
from finetune_trainer.context import PodContext, StageContext, open_context
from finetune_trainer.errors import Interrupted, NotFound, StageError, full_disk
from finetune_trainer.remote_code import remote_code
from finetune_trainer.supervisor.place import ENV_LOG_LEVEL
from finetune_trainer.supervisor.process import ENV_OUTCOME
from finetune_trainer.text import readable, shorten, shorten_bytes

log = logging.getLogger("finetune")

TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_BYTES = 4096
MESSAGE_CHARACTERS = 2048
SUCCEEDED = "Succeeded"
WORKER = "worker"
RANK_ERRORS = ("AcceleratorError", "DistBackendError", "DistNetworkError", "DistStoreError")
"""torch's errors of a device or of the ranks' communication: another process may do better."""
GLOO = "gloo/transport"
"""Of a source file's name in what gloo says when another rank is gone."""
CUDA_OUT_OF_MEMORY = ("cuda error: out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")
"""How CUDA, cuBLAS and cuDNN say it; torch raises their errors as RuntimeError and AcceleratorError."""
PR_SET_PDEATHSIG = 1
LIBRARIES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # transformers' advice about a missing torch is noise in an image that has none on purpose.
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
"""What libraries are told by a stage's environment, and by that of processes it starts."""

StageFunction = Callable[[Any], BaseModel]
"""Takes the context of its own kind of resource."""


def main(
    argv: list[str] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    termination_log: Path = TERMINATION_LOG,
    context: Callable[[Stage], PodContext] = open_context,
    stage_function: Callable[[Stage], StageFunction] | None = None,
) -> int:
    """Run the stage that ``argv`` names; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments == [WORKER]:
        return worker(environ, context)
    if len(arguments) != 1 or arguments[0] not in list(Stage):
        sys.stderr.write(f"usage: python -m finetune_trainer {'|'.join(Stage)}\n")
        return 2
    stage = Stage(arguments[0])
    set_up(environ)
    report, ctx = attempt(stage, context, stage_function or load_stage)
    # A second signal must not interrupt the report.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    write_termination_message(report, termination_log)
    if ctx is not None:
        ctx.reporter.final(report, attempts=1 if report.reason == Reason.INTERRUPTED else 3)
    return exit_code(report)


def worker(environ: Mapping[str, str], context: Callable[[Stage], PodContext]) -> int:
    """The process that trains, started by the supervisor, which tells the world what this one tells it in a file."""
    set_up(environ)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    end_with_parent()
    heartbeat.open_pipe()
    report, ctx = attempt(Stage.TRAIN, context, lambda _: train)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    path = Path(environ[ENV_OUTCOME])
    try:
        path.with_suffix(".tmp").write_text(report.model_dump_json(by_alias=True))
        path.with_suffix(".tmp").replace(path)
    except OSError as error:  # the disk is full: the exit code says it
        log.warning("the outcome cannot be written: %s", error)
    if ctx is not None:
        ctx.reporter.flush()
    return exit_code(report)


def attempt(
    stage: Stage, context: Callable[[Stage], PodContext], stage_function: Callable[[Stage], StageFunction]
) -> tuple[StageReport, PodContext | None]:
    """Run a stage; what came of it, whatever it was."""
    ctx: PodContext | None = None
    try:
        ctx = context(stage)
        log.info(
            "%s of %s/%s, execution %s", stage, ctx.snapshot.job.namespace, ctx.snapshot.job.name, ctx.execution_id
        )
        result = stage_function(stage)(ctx)
    except BaseException as error:
        reason, message = explain(error)
        if reason in (Reason.UNKNOWN, Reason.USER_CODE, Reason.RANK_FAILURE):
            log.exception("unexpected error")
        log.error("%s: %s %s", reason, message, FAILURES[reason].advice)  # noqa: TRY400 - the traceback only helps where the reason is unknown
        report = StageReport(
            stage=stage,
            succeeded=False,
            reason=reason,
            message=shorten(readable(message), MESSAGE_CHARACTERS),
            result=details(error, reason),
        )
        return report, ctx
    report = StageReport(
        stage=stage,
        succeeded=True,
        reason=SUCCEEDED,
        message=f"{stage} succeeded",
        result=result.model_dump(mode="json", by_alias=True),
    )
    return report, ctx


def details(error: BaseException, reason: Reason) -> dict[str, object] | None:
    """What the supervisor or the operator needs to know beside the reason."""
    if reason is Reason.OUT_OF_MEMORY:
        return {"activity": heartbeat.activity()}
    return error.result if isinstance(error, Interrupted) else None


def exit_code(report: StageReport) -> int:
    """0, or the one that the table has for the reason."""
    return 0 if report.succeeded else FAILURES[Reason(report.reason)].exit_code or 1


def end_with_parent() -> None:
    """Have the kernel kill this process when the supervisor is gone: two processes of one execution must not train (prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def load_stage(stage: Stage) -> StageFunction:
    """A stage's function, imported only now: prepare's image has no torch. Training is the supervisor's, which has none either."""
    return load("finetune_trainer.supervisor.run" if stage is Stage.TRAIN else f"finetune_trainer.{stage}.run")


def train(ctx: StageContext) -> BaseModel:
    """The train stage, without the libraries that this run has no use for."""
    left_out = importlib.import_module("finetune_trainer.train.left_out")
    left_out.leave_out(left_out.unused_libraries(ctx.snapshot))
    return load("finetune_trainer.train.run")(ctx)


def load(module: str) -> StageFunction:
    """``module:run``."""
    function: StageFunction = importlib.import_module(module).run
    return function


def set_up(environ: Mapping[str, str]) -> None:
    """Logs for people on stderr; SIGTERM as an exception; libraries that neither call home nor draw progress bars."""
    logging.basicConfig(
        level=environ.get(ENV_LOG_LEVEL, "INFO").upper(),
        format="%(asctime)s %(levelname)-7s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for name in ("httpx", "httpcore", "httpx2", "httpcore2", "botocore", "urllib3", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for key, value in LIBRARIES.items():
        os.environ.setdefault(key, value)
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(_signum: int, _frame: FrameType | None) -> None:
    raise Interrupted


def explain(error: BaseException) -> tuple[Reason, str]:
    """Reason and message for anything a stage may raise. Classes of libraries are known by name, so that none is imported."""
    name = type(error).__name__
    if isinstance(error, StageError):
        return error.reason, error.message
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return Reason.INTERRUPTED, getattr(error, "message", "") or str(Interrupted())
    if is_out_of_memory(error):
        return Reason.OUT_OF_MEMORY, str(error).strip() or name
    if isinstance(error, MemoryError):
        return Reason.HOST_OUT_OF_MEMORY, f"MemoryError: {error}"
    lost = type(error) is RuntimeError and GLOO in str(error)
    if lost or (name in RANK_ERRORS and type(error).__module__.startswith("torch")):
        return Reason.RANK_FAILURE, f"{name}: {str(error).strip()}"
    no_room = full_disk(error)
    if no_room is not None:
        return Reason.DISK_FULL, no_room
    if isinstance(error, NotFound):
        return Reason.UNKNOWN, str(error)
    if isinstance(error, SystemExit):
        return Reason.UNKNOWN, f"the stage ended itself with exit code {error.code}"
    if isinstance(error, ValidationError):
        return Reason.UNKNOWN, f"ValidationError: {error}"
    remote = remote_code(error)
    if remote:
        return Reason.USER_CODE, f"{name} in {remote}: {error}"
    return Reason.UNKNOWN, f"{name}: {error}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's memory did not suffice: torch's allocator says so, or CUDA and its libraries, which allocate by themselves."""
    ours = type(error).__module__.startswith("torch")
    if type(error).__name__ == "OutOfMemoryError" and ours:
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in CUDA_OUT_OF_MEMORY)


def termination_message(report: StageReport) -> str:
    """The report as JSON in at most 4096 bytes: first the warnings give way, then the message, last the result."""
    for candidate in _shorter(report):
        text = json.dumps(candidate.to_json_dict(), ensure_ascii=False, separators=(",", ":"))
        if len(text.encode("utf-8", errors="replace")) <= TERMINATION_BYTES:
            return text
    raise AssertionError("a report without result and message is short")


def _shorter(report: StageReport) -> list[StageReport]:
    candidates = [report]
    if report.result and report.result.get("warnings"):
        candidates.append(report.model_copy(update={"result": {**report.result, "warnings": []}}))
    smallest = candidates[-1]
    candidates += [
        smallest.model_copy(update={"message": shorten_bytes(report.message, n)}) for n in (3000, 2000, 1000, 200)
    ]
    candidates += [
        smallest.model_copy(update={"message": shorten_bytes(report.message, n), "result": None})
        for n in (3000, 1000, 200, 0)
    ]
    return candidates


def write_termination_message(report: StageReport, path: Path) -> None:
    """Where the kubelet reads it. Outside a container the place may not exist: then the log has it."""
    try:
        path.write_bytes(termination_message(report).encode("utf-8", errors="replace"))
    except OSError as error:
        log.debug("no termination message: %s", error)
