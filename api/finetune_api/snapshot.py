"""The run snapshot: everything a run depends on, resolved once at first reconcile and never changed.

It is stored as JSON in an immutable ConfigMap, mounted into every pod, and its hash stands in status. An operator upgrade
between two stages of a job therefore changes nothing for that job.
"""

from __future__ import annotations

import hashlib
import json

from finetune_api.base import ApiModel
from finetune_api.names import job_key
from finetune_api.optimizers import OptimizerName
from finetune_api.progress import Split
from finetune_api.spec import (
    BEGIN_AT_WEIGHTS,
    FineTuneJobSpec,
    Full,
    GaLore,
    Lora,
    LoraBias,
    LoraInitialization,
    MethodType,
    Quantization,
)
from finetune_api.uris import S3Location, parse_uri

SNAPSHOT_VERSION = 1
DEFAULT_LEARNING_RATE = 2e-4
FULL_LEARNING_RATE = 2e-5
"""Of full weights: Stanford Alpaca's (Taori et al., 2023), and that of torchtune's full fine-tuning recipes."""
DEFAULT_MICRO_BATCH = 4


class JobIdentity(ApiModel):
    """Which FineTuneJob this is."""

    name: str
    namespace: str
    uid: str
    generation: int


class Images(ApiModel):
    """Container images of the stages."""

    prepare: str
    train: str


class ResolvedLora(ApiModel):
    """LoRA settings without gaps."""

    rank: int
    alpha: int
    dropout: float
    bias: LoraBias
    target_modules: list[str]
    target_parameters: list[str] = []
    """Of fused experts."""
    exclude_modules: list[str] = []
    layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int] = {}
    loraplus_lr_ratio: float | None = None
    modules_to_save: list[str] = []
    initialization: LoraInitialization = LoraInitialization.DEFAULT
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def begins_at_weights(self) -> bool:
        """Whether a plain adapter of twice the rank is published."""
        return self.initialization in BEGIN_AT_WEIGHTS

    @property
    def highest_rank(self) -> int:
        """Of all modules of the published adapter."""
        return (2 if self.begins_at_weights else 1) * max(self.rank, *self.rank_pattern.values(), 0)


class ResolvedMethod(ApiModel):
    """The method without gaps; ``quantization`` is present exactly for QLoRA, ``full`` for Full, where ``lora`` means nothing."""

    type: MethodType
    lora: ResolvedLora
    quantization: Quantization | None = None
    full: Full | None = None


class Plan(ApiModel):
    """Defaults that depend on other fields, resolved."""

    method: ResolvedMethod
    learning_rate: float
    micro_batch_sequences: int
    gradient_accumulation_steps: int
    galore: GaLore | None = None
    """Present for that optimizer."""


def output_location(spec: FineTuneJobSpec, name: str, uid: str) -> S3Location:
    """The prefix of everything a job publishes."""
    location = parse_uri(spec.output.uri)
    assert isinstance(location, S3Location)  # the spec's pattern allows nothing else
    return location.join(job_key(name, uid))


def workspace_location(spec: FineTuneJobSpec, name: str, uid: str) -> S3Location:
    """The prefix of a job's intermediate results."""
    location = parse_uri(spec.output.workspace.uri or spec.output.uri)
    assert isinstance(location, S3Location)  # the spec's pattern allows nothing else
    return location.join(job_key(name, uid), "workspace")


class NodeGpu(ApiModel):
    """A kind of GPU that nodes have, by their labels."""

    product: str
    """Label nvidia.com/gpu.product."""
    memory_mib: int | None = None
    """Label nvidia.com/gpu.memory: the least that a node with this product tells."""
    shared: bool = False
    """Several pods use one at a time: its memory is nobody's alone."""
    nodes: int
    """How many nodes have it that the training pod may land on."""
    per_node: int | None = None
    """The most of them that one node has."""


class Snapshot(ApiModel):
    """Input of every stage."""

    version: int = SNAPSHOT_VERSION
    operator_version: str
    job: JobIdentity
    spec: FineTuneJobSpec
    plan: Plan
    images: Images
    node_gpus: list[NodeGpu] | None = None
    """What the training pod may land on, as far as nodes tell; absent where the spec says what its GPUs can hold."""

    @property
    def output(self) -> S3Location:
        """``<output.uri>/<name>-<uid8>``: the prefix of everything this job publishes."""
        return output_location(self.spec, self.job.name, self.job.uid)

    @property
    def workspace(self) -> S3Location:
        """``<workspace.uri>/<name>-<uid8>/workspace``: where prepared data and stage results live, until they are deleted.

        Never the output or above it, whatever the URIs: with the same URI for both, deleting the one would take the other.
        """
        return workspace_location(self.spec, self.job.name, self.job.uid)

    @property
    def split(self) -> Split:
        """How the plan cuts an optimizer step."""
        training = self.spec.training
        return Split(
            micro_batch_sequences=self.plan.micro_batch_sequences,
            gradient_accumulation_steps=self.plan.gradient_accumulation_steps,
            gradient_checkpointing=training.gradient_checkpointing,
            max_sequence_tokens=training.max_sequence_tokens,
        )

    def resolved(self, method: MethodType | None) -> Snapshot:
        """With the method that the memory plan chose. For what is loaded and merged, never for :meth:`digest`."""
        if method is None or method is self.plan.method.type:
            return self
        quantization = self.spec.method.quantization if method is MethodType.QLORA else None
        chosen = self.plan.method.model_copy(update={"type": method, "quantization": quantization})
        return self.model_copy(update={"plan": self.plan.model_copy(update={"method": chosen})})

    def with_lora(self, lora: Lora) -> Snapshot:
        """With the settings of the adapter that training goes on from. Not for :meth:`digest` either."""
        method = self.spec.method.model_copy(update={"lora": lora})
        spec = self.spec.model_copy(update={"method": method})
        resolved = self.plan.method.model_copy(update={"lora": resolve_plan(spec).method.lora})
        return self.model_copy(update={"spec": spec, "plan": self.plan.model_copy(update={"method": resolved})})

    def canonical_json(self) -> str:
        """One byte form per value: sorted keys, no white space."""
        return json.dumps(self.to_json_dict(), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 of :meth:`canonical_json`, hex, but for the nodes: a job that is frozen anew, because its ConfigMap was deleted, is
        the same although other nodes are there."""
        return hashlib.sha256(self.model_copy(update={"node_gpus": None}).canonical_json().encode()).hexdigest()


RESERVED_STOP_SECONDS = 10.0
"""Of a training pod's grace period, for the termination message and the final post."""


def saving_seconds(grace: float) -> float:
    """How much of a training pod's grace period there is to save a checkpoint."""
    return max(grace / 2, grace - RESERVED_STOP_SECONDS)


def largest_divisor(total: int, limit: int) -> int:
    """The largest divisor of ``total`` that is not above ``limit``."""
    return next(d for d in range(min(total, limit), 0, -1) if total % d == 0)


def rank_share(global_batch_sequences: int, ranks: int) -> int:
    """Rows of a step that each rank has room for: where they cannot be shared out evenly, some get rows that count for nothing."""
    return -(-global_batch_sequences // ranks)


def ranks_per_node(spec: FineTuneJobSpec) -> int:
    """Processes of a pod that train together: one per GPU, and one as long as the plan that chooses them is not made."""
    return max(1, spec.compute.gpus() or 1)


def rank_count(spec: FineTuneJobSpec) -> int:
    """Those of all pods."""
    return spec.compute.nodes * ranks_per_node(spec)


def resolve_plan(spec: FineTuneJobSpec) -> Plan:
    """Resolve the defaults that depend on other fields.

    alpha = 2 × rank and a learning rate of 2e-4 are what the LoRA and QLoRA papers' successors settled on; the micro-batch
    is the largest divisor of the global batch up to 4, which keeps a GPU or CPU busy and fits where a sequence does.
    A micro-batch the user names is lowered to the next divisor, so that the global batch stays exact. Several GPUs share a step's
    rows evenly; where they cannot, some get rows that count for nothing.
    """
    method = spec.method
    lora = method.lora
    ranks_of = dict(lora.rank_pattern or {})
    alphas = {} if lora.alpha is not None else {name: 2 * rank for name, rank in ranks_of.items()}
    training = spec.training
    limit = training.micro_batch_sequences or DEFAULT_MICRO_BATCH
    share = rank_share(training.global_batch_sequences, rank_count(spec))
    micro_batch = largest_divisor(share, limit)
    # On a CPU there is no GPU memory to save; elsewhere prepare chooses (RunPlan).
    kind = MethodType.LORA if method.type is MethodType.AUTO and training.use_cpu else method.type
    return Plan(
        method=ResolvedMethod(
            type=kind,
            lora=ResolvedLora(
                rank=lora.rank,
                alpha=lora.alpha if lora.alpha is not None else 2 * lora.rank,
                dropout=lora.dropout,
                bias=lora.bias,
                target_modules=list(lora.target_modules),
                target_parameters=list(lora.target_parameters or []),
                exclude_modules=list(lora.exclude_modules or []),
                layers_to_transform=lora.layers_to_transform,
                rank_pattern=ranks_of,
                alpha_pattern={**alphas, **(lora.alpha_pattern or {})},
                loraplus_lr_ratio=lora.loraplus_lr_ratio,
                initialization=lora.initialization,
                modules_to_save=list(lora.modules_to_save or []),
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
            ),
            quantization=method.quantization if method.type is MethodType.QLORA else None,
            full=(method.full or Full()) if method.type is MethodType.FULL else None,
        ),
        learning_rate=training.optimizer.learning_rate
        or (FULL_LEARNING_RATE if method.type is MethodType.FULL else DEFAULT_LEARNING_RATE),
        micro_batch_sequences=micro_batch,
        gradient_accumulation_steps=share // micro_batch,
        galore=(training.optimizer.galore or GaLore())
        if training.optimizer.name is OptimizerName.GALORE_ADAMW
        else None,
    )


def make_snapshot(
    spec: FineTuneJobSpec,
    job: JobIdentity,
    default_images: Images,
    operator_version: str,
    node_gpus: list[NodeGpu] | None = None,
) -> Snapshot:
    """Freeze a job: pure, so that the same inputs give the same digest.

    Fields that may change during a run (suspend, deadlines, TTL) are set to their defaults in the snapshot.
    """
    frozen = spec.model_copy(
        update={
            "suspend": False,
            "active_deadline_seconds": None,
            "ttl_seconds_after_finished": None,
            "pending_timeout_seconds": FineTuneJobSpec.model_fields["pending_timeout_seconds"].default,
        }
    )
    own = spec.runtime.image
    images = Images(prepare=own, train=own) if own else default_images
    return Snapshot(
        operator_version=operator_version,
        job=job,
        spec=frozen,
        plan=resolve_plan(spec),
        images=images,
        node_gpus=node_gpus,
    )
