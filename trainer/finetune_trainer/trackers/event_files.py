"""TensorBoard: ``reports/tensorboard/``, made at the end of the finished lists of steps and evaluations.

Whatever interrupted the run, its curves are then whole, and nothing stands on them twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_api.failures import GPU_PATIENCE_SECONDS
from finetune_api.results import TENSORBOARD_DIR, FileRecord, PrepareResult, TrackedRun
from finetune_api.spec import TrackerType
from finetune_trainer.context import StageContext
from finetune_trainer.s3 import S3Store
from finetune_trainer.trackers.lines import Line, metrics
from finetune_trainer.trackers.tracking import configuration, work_folder
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)
EVENT_FILE = "events.out.tfevents.finetune"
"""One name: an execution that comes again replaces it. TensorBoard knows event files by ``tfevents``."""
FILE_VERSION = "brain.Event:2"


def store_event_files(
    ctx: StageContext, output: S3Store, lines: Sequence[Line], prepared: PrepareResult
) -> tuple[list[FileRecord], list[TrackedRun]]:
    """What is in the bucket then, and what there is to say of it; nothing unless the job asks for TensorBoard."""
    kind = TrackerType.TENSORBOARD
    if all(tracker.type is not kind for tracker in ctx.snapshot.spec.trackers or []):
        return [], []
    path = work_folder(ctx, kind) / EVENT_FILE
    try:
        write_events(path, lines, configuration(ctx.snapshot, prepared))
    except (ImportError, OSError) as error:
        # The curves stand in metrics.jsonl too: no reason to lose a trained adapter.
        problem = f"no event file: {type(error).__name__}: {error}"
        log.warning("%s: %s", kind.value, problem)
        return [], [TrackedRun(type=kind, missing_lines=len(lines), problem=problem)]
    key = f"{TENSORBOARD_DIR}/{EVENT_FILE}"
    record = wait_until_available(ctx, lambda: output.upload_file(path, key), limit_seconds=GPU_PATIENCE_SECONDS)
    return [record], [TrackedRun(type=kind, url=output.uri(TENSORBOARD_DIR))]


def write_events(path: Path, lines: Sequence[Line], config: dict[str, Any]) -> None:
    """Scalars of every line at the time at which it was made, and the configuration as text."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.summary.writer.record_writer import RecordWriter

    seconds = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
    began = time.time() - max(seconds.values(), default=0.0)
    text = Summary.Value(
        tag="config",
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
        tensor=TensorProto(
            dtype=DT_STRING,
            string_val=[f"```\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```".encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        ),
    )
    events = [
        Event(wall_time=began, file_version=FILE_VERSION),
        Event(wall_time=began, step=0, summary=Summary(value=[text])),
        *(
            Event(
                wall_time=began + seconds.get(line["step"], 0.0),
                step=int(line["step"]),
                summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in metrics(line).items()]),
            )
            for line in lines
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
