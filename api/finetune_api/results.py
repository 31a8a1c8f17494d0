"""What stages leave in the bucket. Each stage writes its result last, so a result that exists is complete.

Layout below ``<output.uri>/<name>-<uid8>/``::

    adapter/            adapter_config.json, adapter_model.safetensors, tokenizer, chat template, README.md (model card)
    merged/             merged model folder, if asked for
    model/              with method Full instead of both: the whole model folder
    reports/            index.html, metrics.jsonl (one JSON object per logged step and evaluation), answers.json (base and tuned),
                        metrics.json (what both score)
                        tensorboard/ (event files, if asked for)
    manifest.json       written last: no manifest, no result

and below the workspace (``workspace/`` there by default)::

    prepare/train.parquet, prepare/held_out.parquet, prepare/prompts.json, prepare/preview.json, prepare/result.json (last)
    train/owner.json (the execution that may write), train/base.json (evaluation of the base), train/split.json
    train/weights/ (method Full: what was trained, in float32, and the tokenizer; publish makes model/ of it)
    train/result.json (last)
    checkpoints/<step, 8 digits>-<execution id>/… and complete.json (last)
    attempts/<stage>-<execution id>.json (when an execution begins)

``prepare/*.parquet``: columns ``row`` int64 (position in the concatenated sources), ``source`` string ("file:line"),
``input_ids`` list<int32>, ``labels`` list<int32> (-100: not learned), ``prompt_tokens`` int32 (length of the prompt prefix of
the row's last learned turn; 0 for text); file metadata ``finetune.prepared_version``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.planner.distributed import Layout
from finetune_api.progress import Restart, Split
from finetune_api.scores import JudgeVerdict, TaskScore, TextMetrics
from finetune_api.snapshot import Snapshot
from finetune_api.spec import Lora, MethodType, TrackerType

IGNORED = -100
"""Label of a token that is not learned, in ``prepare/*.parquet``: PyTorch's cross entropy skips it."""
PREPARED_VERSION = 1
RESULT_VERSION = 1
MANIFEST_VERSION = 1
SCORES_VERSION = 1
CHECKPOINT_VERSION = 1

PREPARE_RESULT = "prepare/result.json"
PREPARED_TRAIN = "prepare/train.parquet"
PREPARED_HELD_OUT = "prepare/held_out.parquet"
PREPARED_PROMPTS = "prepare/prompts.json"
PREPARED_PREVIEW = "prepare/preview.json"
PREPARED_TASK_ROWS = "prepare/task-rows.parquet"
PREPARED_TASK_PROMPTS = "prepare/task-prompts.json"
PREPARED_BASE_TASK_ROWS = "prepare/base-task-rows.parquet"
PREPARED_BASE_TASK_PROMPTS = "prepare/base-task-prompts.json"
PREPARED_TASK_DATA = "prepare/tasks.tar"
PREPARED_ADAPTER = "prepare/initial-adapter"
TRAIN_RESULT = "train/result.json"
ADAPTER_DIR = "adapter"
MERGED_DIR = "merged"
MODEL_DIR = "model"
WEIGHTS_DIR = "train/weights"
WEIGHTS_FILE = "trained.safetensors"
REPORTS_DIR = "reports"
METRICS_FILE = "reports/metrics.jsonl"
TENSORBOARD_DIR = "reports/tensorboard"
ANSWERS_FILE = "reports/answers.json"
SCORES_FILE = "reports/metrics.json"
REPORT_FILE = "reports/index.html"
MANIFEST = "manifest.json"
ATTEMPTS_DIR = "attempts"
CHECKPOINTS_DIR = "checkpoints"
CHECKPOINT_MARKER = "complete.json"
TRAIN_OWNER = "train/owner.json"
TASK_REPLIES = "train/tasks.json"
BASE_EVALUATION = "train/base.json"
JUDGE_LETTERS = "publish/judge.json"
TRAIN_SPLIT = "train/split.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(ApiModel):
    """A file below the job's output prefix (or workspace), with what is needed to check it."""

    path: str
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class SourceFile(ApiModel):
    """A file of the base model, with what its source tells of it without being read."""

    path: str
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256 | None = None
    """Known for files that were read, and for all on the Hub."""
    version: str | None = None
    """What differs if the file was changed: the object's ETag; of a file in a volume a hash over samples of its bytes."""


class ExecutionRecord(ApiModel):
    """One execution (one pod) of a stage."""

    stage: str
    execution_id: str
    started_at: str | None = None
    """RFC 3339; absent where the execution left no note of its beginning."""
    completed: bool = True
    """Whether it is the one whose result counts. Any other failed, or was interrupted."""


class LengthPercentiles(ApiModel):
    """Row lengths in tokens, before truncation."""

    p50: int
    p95: int
    p99: int
    max: int


class DataSummary(ApiModel):
    """What the data checks found."""

    rows: int
    train_rows: int
    held_out_rows: int
    bad_rows: int
    truncated_rows: int
    dropped_rows: int
    duplicate_rows: int
    """Exact duplicates in the sources; they are counted, and kept in training on one side of the split."""
    formats: dict[str, int]
    """Rows per detected format."""
    train_tokens: int
    train_target_tokens: int
    held_out_tokens: int
    held_out_target_tokens: int
    held_out_overlap_rows: int = 0
    """Held-out rows whose prompt is trained on too. The split keeps them apart; data.heldOut.sources may not."""
    near_duplicate_rows: int = 0
    """Training rows that are nearly the same as another one, exact duplicates and one row of each cluster not counted."""
    held_out_near_rows: int = 0
    """Held-out rows that are nearly the same as a training row, and not exactly. The split keeps them apart where it can."""
    pii: dict[str, int] = {}
    """Personal data found (and replaced, with data.checks.pii: Redact), by kind."""
    tokens: LengthPercentiles


class PreparedPrompt(ApiModel):
    """A held-out prompt, or one of evaluation.generation.sources. ``prepare/prompts.json`` is a JSON array of these: the first
    evaluation.generation.prompts that are ``answered`` are answered by base and tuned model, and on all of them, at least three, the
    tokenizer is checked in later stages."""

    row: int
    """Position in the held-out file's ``row`` column; of a prompt of the sources, its place among their rows."""
    answered: bool = True
    """False of held-out prompts beside those of the sources."""
    prompt: str
    """What a person wrote: the last user turn, the prompt, or the beginning of a text."""
    reference: str
    """The answer that the data has; empty where it has none."""
    messages: list[dict[str, Any]] | None = None
    """The turns before the answer, where the row has turns: the chat template, with a generation prompt, makes ``text`` of them."""
    tools: list[dict[str, Any]] | None = None
    """What may be called, for the chat template."""
    from_tokens: bool = False
    """``input_ids`` stand in the data: no tokenizer made them, and none is checked on them."""
    text: str
    """What the tokenizer is given (without adding special tokens, if ``messages`` is present)."""
    input_ids: list[int]
    """What it must make of it, in every later stage."""


class PreviewRow(ApiModel):
    """The tokens of a training row, as the model sees them. ``prepare/preview.json`` is a JSON array of the first few rows."""

    source: str
    """file:line"""
    length: int
    """Tokens of the whole row."""
    input_ids: list[int]
    """The first of them."""
    tokens: list[str]
    """Each one's text."""
    learned: list[bool]
    """Whether it is learned. The first token never is: nothing comes before it."""


class RunPlan(ApiModel):
    """What training holds on a GPU, planned before one is asked for (:mod:`finetune_api.planner`), and what follows from that. Bytes
    are per GPU."""

    method: MethodType
    """What Auto became, or what was asked for."""
    split: Split
    """With the largest efficient micro-batch that fits."""
    layout: Layout = Layout.SINGLE
    """How the base is held: whole on one GPU (Single) or on each (DDP), in parts on several (FSDP), or in host memory (CPUOffload)."""
    gpus_per_node: int | None = None
    """How many; absent in plans of versions that did not choose them."""
    gpu: str | None = None
    """The kind of GPU it was planned for; absent where that is not known."""
    unsuitable_gpu_products: list[str] | None = None
    """Products on nodes that the job may use and this plan does not fit: the training pod must not land there."""
    needed_bytes: int
    """The most at any time: loading, training or evaluation, with allowances."""
    usable_bytes: int | None = None
    """What a process can allocate."""
    peak_allocated_bytes: int
    """What torch.cuda.max_memory_allocated should show after loading, evaluation and training (``metrics.peakGpuBytes``)."""
    estimated_seconds: float | None = None
    """Of the optimization; an estimate, and only for products whose speed is known."""
    verified: bool
    """The model's family is one whose plans were compared with simulated runs."""
    summary: str
    """The plan and why it was chosen, in sentences."""


class InitialAdapterRecord(ApiModel):
    """The adapter that training goes on from; its files lie below ``prepare/initial-adapter/``."""

    uri: str
    commit: str | None = None
    """On the Hub."""
    lora: Lora
    """Its settings, as the spec would have them."""


class TrainedWeights(ApiModel):
    """What method Full trains: names of tensors in the model's files."""

    tensors: list[str]
    signal_to_noise: dict[str, float] | None = None
    """Of every matrix that Spectrum ranked."""


class TrainedToken(ApiModel):
    """A token whose rows of the embeddings are trained."""

    token: str
    id: int
    new: bool
    """The tokenizer has it from model.newTokens."""
    occurrences: int = 0
    """In the training rows."""


class TrainedTokens(ApiModel):
    """Those of a job, by id."""

    tokens: list[TrainedToken]
    resized_to: int | None = None
    """Rows of the embeddings with the new tokens; absent where the model has room for them, as many have, or there are none."""

    @property
    def ids(self) -> list[int]:
        """Ascending."""
        return [token.id for token in self.tokens]

    @property
    def new(self) -> list[str]:
        """The new ones."""
        return [token.token for token in self.tokens if token.new]


class TaskDataset(ApiModel):
    """Data of evaluation.tasks from the Hugging Face Hub, as they were fetched."""

    dataset: str
    commit: str


class PrepareResult(ApiModel):
    """``prepare/result.json``."""

    version: int = RESULT_VERSION
    snapshot_digest: Sha256
    execution_id: str | None = None
    data: DataSummary
    data_hash: Sha256
    """SHA-256 over the prepared train and held-out rows (ids and labels), independent of Parquet's bytes."""
    model_commit: str | None = None
    """Commit of the base model on the Hub; absent for s3:// and pvc://."""
    model_files: list[SourceFile]
    """Every file of the base model: training must find the same."""
    tokenizer_hash: Sha256
    """SHA-256 over the tokenizer files' hashes, the chat template and the new tokens."""
    trained_tokens: TrainedTokens | None = None
    """Those whose rows of the embeddings are trained; absent where there are none."""
    trainable_parameters: int
    total_parameters: int
    total_steps: int
    plan: RunPlan | None = None
    """Absent on a CPU, and for models whose sizes config.json does not tell."""
    initial_adapter: InitialAdapterRecord | None = None
    weights: TrainedWeights | None = None
    """Present for method Full."""
    task_datasets: list[TaskDataset] = []
    files: list[FileRecord]
    warnings: list[str] = []


def chosen(snapshot: Snapshot, prepared: PrepareResult) -> Snapshot:
    """The snapshot with the method that the memory plan has chosen, and the settings of the adapter that training goes on from: what is
    loaded, merged and told of."""
    if prepared.initial_adapter is not None:
        snapshot = snapshot.with_lora(prepared.initial_adapter.lora)
    return snapshot.resolved(prepared.plan.method if prepared.plan is not None else None)


class Verification(ApiModel):
    """The adapter (or with method Full the trained weights) fetched back from the bucket, loaded freshly over the base, against the trained model in memory."""

    held_out_loss_trained: float
    held_out_loss_reloaded: float
    relative_difference: float
    tolerance: float


class TrainOwner(ApiModel):
    """``train/owner.json``: the execution that may write checkpoints and results. A later one takes it over; the earlier one
    finds that out before it completes anything."""

    execution_id: str
    number: Annotated[int, Field(ge=1)]
    """Grows by one with each execution."""


class CheckpointMarker(ApiModel):
    """``checkpoints/<step>-<execution id>/complete.json``: written last. A checkpoint without it does not exist."""

    version: int = CHECKPOINT_VERSION
    snapshot_digest: Sha256
    execution_id: str
    execution_number: int
    step: Annotated[int, Field(ge=0)]
    total_steps: int
    split: Split
    world_size: int = 1
    held_out_loss: float | None = None
    """Measured at this step, where one was."""
    created_at: str
    files: list[FileRecord]
    """Paths relative to the checkpoint's folder."""


class TaskPrompt(ApiModel):
    """A text that a task has continued. ``prepare/task-prompts.json`` is a JSON array of these."""

    input_ids: list[int]
    max_new_tokens: int
    until: list[str]
    """The continuation ends before the first of these."""


class TaskReplies(ApiModel):
    """One model's answers to the requests of all tasks, in the order of the prepared files."""

    log_likelihoods: list[float]
    """Of each continuation of ``prepare/task-rows.parquet``, the sum over its tokens."""
    greedy: list[bool]
    """Whether it is what the model would say."""
    texts: list[str]


class TaskAnswers(ApiModel):
    """``train/tasks.json``."""

    base: TaskReplies
    tuned: TaskReplies


class BaseEvaluation(ApiModel):
    """``train/base.json``: what the base model was measured at before training, so that it is measured once."""

    snapshot_digest: Sha256
    nll: list[float]
    tokens: list[int]
    right: list[int] | None = None
    """Learned tokens that are the most likely ones; absent of what an older image measured."""
    answers: list[str]
    tasks: TaskReplies | None = None


class Answer(ApiModel):
    """One prompt, what was expected, and what base and tuned model answer (greedy)."""

    row: int
    prompt: str
    reference: str
    """Empty where there is none: in the sources of prompts, and where an answer only calls a tool."""
    base: str
    tuned: str


class TrainMetrics(ApiModel):
    """Losses are Σ NLL / Σ tokens over learned tokens (natural logarithm); perplexity is exp(loss)."""

    held_out_loss_base: float
    held_out_loss: float
    perplexity_base: float
    perplexity: float
    token_accuracy_base: float | None = None
    """Share of the learned tokens of the held-out rows that the model gives the highest probability; absent from older images."""
    token_accuracy: float | None = None
    final_train_loss: float
    steps: int
    epochs: float
    tokens: int
    tokens_per_second: float
    train_seconds: float
    early_stop_step: int | None = None
    """The step that evaluation.earlyStopping ended training after; ``steps`` is the same then."""
    peak_gpu_bytes: int | None = None
    """torch.cuda.max_memory_allocated after the optimization, of the execution that ended it; absent on a CPU."""


class QuantizedModule(ApiModel):
    """A base weight that training held in 4 or 8 bit: the SHA-256 of its bytes and quantization constants."""

    name: str
    sha256: Sha256
    offset: float | None = None
    """What double quantization took off the constants: their mean, whose last bits differ between CPU and GPU."""
    constants_mean: float
    """Mean of the constants of blocks (4 bit) or rows (8 bit) as used."""
    codes_sample: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")]
    """Bytes at evenly spread positions. Sample and mean tell another device's rounding from another weight where
    ``sha256`` differs."""


class TrackedRun(ApiModel):
    """The run that an experiment tracker was told of."""

    type: TrackerType
    url: str | None = None
    """Where a person finds it, as far as the tracker says."""
    missing_lines: int = 0
    """Steps and evaluations that it was not told of."""
    problem: str | None = None
    """Why, or what went wrong on the way."""


class TrainResult(ApiModel):
    """``train/result.json``."""

    version: int = RESULT_VERSION
    snapshot_digest: Sha256
    execution_id: str
    adapter_files: list[FileRecord]
    """None for method Full."""
    weights: TrainedWeights | None = None
    weights_files: list[FileRecord] = []
    """Of method Full, below ``train/weights/`` in the workspace."""
    report_files: list[FileRecord]
    metrics: TrainMetrics
    verification: Verification
    base_files: list[FileRecord]
    """Every file of the base model as loaded (path relative to the model folder), hashed: publish must merge the same."""
    quantized_modules: list[QuantizedModule]
    tokenizer_hash: Sha256 | None = None
    """As in ``prepare/result.json``, of the files and the chat template that training used."""
    base_dtype: str = "bfloat16"
    """Element type that the base was loaded in (and, for QLoRA, quantized from)."""
    check_rows: int = 0
    check_loss: float | None = None
    """Σ NLL / Σ tokens of the reloaded model on the first ``check_rows`` held-out rows: publish must measure the same."""
    trainable_parameters: int
    device: str
    versions: dict[str, str]
    selected_step: int | None = None
    """The step whose weights these are, where it is not the last (output.select: Best)."""
    resumed_from_steps: list[int] = []
    """Steps whose checkpoints training went on from, in order."""
    split: Split | None = None
    """How steps were cut at the end."""
    restarts: list[Restart] = []
    """Restarts inside pods, all executions'."""
    warnings: list[str] = []
    """What a reader of the result should know, in sentences without a full stop."""
    checkpoint_blocked_seconds: list[float] = []
    """How long each checkpoint held the step loop up (the copy to host memory)."""
    tracked: list[TrackedRun] = []
    """What became of spec.trackers."""
    task_replies: FileRecord | None = None
    """``train/tasks.json``, where evaluation.tasks are asked for."""


class MergeCheck(ApiModel):
    """The merged model against base + adapter (of method Full: the published model against base and trained weights), by a layer-streamed
    forward on held-out rows."""

    held_out_loss_adapter: float
    held_out_loss_merged: float
    held_out_loss_trained: float | None = None
    """What the train stage measured on the same rows; absent where the merge is into other weights than it used."""
    relative_difference: float
    """Merged against base + adapter."""
    tolerance: float
    rows: int


class HeldOutScores(ApiModel):
    """One model on the learned tokens of the held-out rows."""

    loss: float
    perplexity: float | None = None
    """Absent beyond what a float holds."""
    token_accuracy: float | None = None
    """Share of the learned tokens that the model gives the highest probability."""


class HeldOutComparison(ApiModel):
    """Base and tuned model on the same rows."""

    rows: int
    base: HeldOutScores
    tuned: HeldOutScores


class Scores(ApiModel):
    """``reports/metrics.json``: everything that base and tuned model are compared by."""

    version: int = SCORES_VERSION
    snapshot_digest: Sha256
    answers_sha256: Sha256
    """Of ``reports/answers.json``, of which ``text`` is computed."""
    held_out: HeldOutComparison
    text: TextMetrics | None = None
    """Absent where no prompt was answered or no metric asked for."""
    judge: JudgeVerdict | None = None
    """Absent without evaluation.judge."""
    tasks: list[TaskScore] = []
    """Of evaluation.tasks, and of the tasks that a group consists of."""
    warnings: list[str] = []


class Manifest(ApiModel):
    """``manifest.json``: the proof that a job's output is whole."""

    version: int = MANIFEST_VERSION
    job: dict[str, object]
    """name, namespace, uid."""
    base_model: dict[str, object]
    """uri, revision, commit (absent for s3:// and pvc://, whose versions ``baseFiles`` tells)."""
    base_files: list[FileRecord] = []
    """Every file of the base model as it was trained on, paths relative to the model folder."""
    initial_adapter: InitialAdapterRecord | None = None
    weights: TrainedWeights | None = None
    """What of the model was trained, with method Full."""
    data_hash: Sha256
    snapshot_digest: Sha256
    config: dict[str, object]
    """The resolved snapshot."""
    metrics: TrainMetrics
    text_metrics: TextMetrics | None = None
    """What the answers score; all scores stand in ``reports/metrics.json``."""
    judge: JudgeVerdict | None = None
    tasks: list[TaskScore] = []
    task_datasets: list[TaskDataset] = []
    """What those tasks read from the Hub."""
    verification: Verification
    merge_check: MergeCheck | None = None
    data: DataSummary
    plan: RunPlan | None = None
    """What was planned, beside ``metrics`` which tells what was measured."""
    versions: dict[str, str]
    attempts: list[ExecutionRecord]
    """The executions of all stages, failed ones included, in the order in which they began."""
    tracked: list[TrackedRun] = []
    """The runs of experiment trackers."""
    warnings: list[str] = []
    created_at: str
    files: list[FileRecord]


class PrepareReport(ApiModel):
    """``StageReport.result`` of prepare: what the operator needs, well under the 4 KiB of a termination message."""

    data: DataSummary
    data_hash: Sha256
    model_commit: str | None = None
    trainable_parameters: int
    total_parameters: int
    total_steps: int
    plan: RunPlan | None = None
    trained: bool
    """A complete ``train/result.json`` of this snapshot exists already: training need not run (again)."""
    fetch_pending: bool = False
    """The base model is not in the cache yet: it may be fetched while the training Job waits in its queue."""
    warnings: list[str] = []


class FetchReport(ApiModel):
    """``StageReport.result`` of fetch."""

    cached: bool
    """The base model is in the cache; otherwise that cannot hold it."""


class TrainReport(ApiModel):
    """``StageReport.result`` of train."""

    metrics: TrainMetrics
    verification: Verification
    adapter_bytes: int
    device: str
    selected_step: int | None = None


class CleanupReport(ApiModel):
    """``StageReport.result`` of cleanup."""

    objects: int


class PublishReport(ApiModel):
    """``StageReport.result`` of publish. Repeats the metrics, so that a lost train report is made good here."""

    metrics: TrainMetrics
    text_metrics: TextMetrics | None = None
    judge: JudgeVerdict | None = None
    tasks: list[TaskScore] = []
    """The first number of each of evaluation.tasks."""
    verification: Verification
    merge_check: MergeCheck | None = None
    adapter_bytes: int
    """0 with method Full."""
    merged_bytes: int | None = None
    model_bytes: int | None = None
    """Of method Full."""
    files: int
    warnings: list[str] = []
