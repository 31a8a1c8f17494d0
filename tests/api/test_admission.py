"""What the real API server accepts and refuses, and in which words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from finetune_api.optimizers import REFUSED as REFUSED_OPTIMIZERS
from finetune_api.optimizers import RUNNING, SCHEDULE_FREE, OptimizerName
from tests.support.apiserver import ApiServer

pytestmark = pytest.mark.light

MINIMAL: dict[str, Any] = {
    "model": {"uri": "hf://meta-llama/Llama-3.1-8B-Instruct"},
    "data": {"train": [{"uri": "s3://acme-data/support/train.jsonl"}]},
    "output": {"uri": "s3://acme-models/support"},
}


def merged(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """JSON merge patch."""
    out = copy.deepcopy(base)
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merged(out[key], value)
        else:
            out[key] = value
    return out


def templated(**parts: str) -> dict[str, Any]:
    """A source whose rows are written by a template."""
    return {"data": {"train": [{"uri": "s3://bucket/x.jsonl", "template": parts}]}}


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("the smallest job", {}),
    ("a revision of a hub model", {"model": {"revision": "main"}}),
    ("a model in a bucket", {"model": {"uri": "s3://models/llama"}}),
    ("a model on a claim", {"model": {"uri": "pvc://models/llama"}}),
    ("a hub dataset", {"data": {"train": [{"uri": "hf://datasets/org/name/data/train.parquet"}]}}),
    ("an https file", {"data": {"train": [{"uri": "https://example.com/a/train.csv"}]}}),
    ("steps instead of epochs", {"training": {"length": {"steps": 10}}}),
    ("a fraction of an epoch", {"training": {"length": {"epochs": 0.5}}}),
    ("personal data replaced", {"data": {"checks": {"pii": "Redact", "nearDuplicates": {"threshold": 0.9}}}}),
    ("held-out sources", {"data": {"heldOut": {"sources": [{"uri": "s3://bucket/held.jsonl"}]}}}),
    (
        "ranks of single modules",
        {"method": {"lora": {"rankPattern": {"q_proj": 8, "layers.0.mlp.up_proj": 64}, "alphaPattern": {"q_proj": 8}}}},
    ),
    ("LoRA+", {"method": {"lora": {"loraPlusLRRatio": 16}}}),
    ("full weights", {"method": {"type": "Full"}}),
    ("full weights that Spectrum chooses", {"method": {"type": "Full", "full": {"spectrum": {}}}}),
    (
        "full weights of some modules with GaLore",
        {
            "method": {"type": "Full", "full": {"modules": ["mlp", "layers.31"]}},
            "training": {"optimizer": {"name": "galore_adamw", "galore": {"rank": 64}}},
            "output": {"merged": {"dtype": "float16"}},
        },
    ),
    ("early stopping", {"evaluation": {"intervalSteps": 10, "earlyStopping": {}}}),
    ("packing", {"training": {"packing": True}}),
    (
        "an adapter to go on from",
        {
            "model": {
                "uri": "hf://org/model",
                "initialAdapter": {"uri": "s3://bucket/out/job-1a2b3c4d/adapter", "secretRef": {"name": "s3"}},
            }
        },
    ),
    ("modules trained whole", {"method": {"lora": {"modulesToSave": ["embed_tokens", "lm_head"]}}}),
    (
        "experts",
        {
            "method": {
                "lora": {
                    "dropout": 0,
                    "targetParameters": ["mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"],
                }
            }
        },
    ),
    (
        "new tokens, and others whose rows are trained",
        {
            "model": {"uri": "hf://org/model", "newTokens": ["<tool_call>", "<two words>"]},
            "method": {"lora": {"trainableTokens": ["<|im_start|>", " word"], "modulesToSave": ["norm"]}},
        },
    ),
    ("EVA", {"method": {"lora": {"initialization": "EVA"}}}),
    ("PiSSA with QLoRA", {"method": {"type": "QLoRA", "lora": {"initialization": "PiSSA"}}}),
    ("LoftQ", {"method": {"type": "QLoRA", "lora": {"initialization": "LoftQ"}}}),
    ("names of target modules", {"method": {"lora": {"targetModules": ["q_proj", "v_proj"]}}}),
    (
        "patterns of target modules",
        {
            "method": {
                "lora": {"targetModules": ["layers.[0-7].self_attn.*", "up_pro?"], "excludeModules": ["*.k_proj"]}
            }
        },
    ),
    ("a base in 8 bit", {"method": {"type": "QLoRA", "quantization": {"type": "Int8"}}}),
    (
        "LoRA in shards with a type that it does not use",
        {"method": {"quantization": {"type": "Int8"}}, "training": {"cpuOffload": "IfNeeded"}},
    ),
    ("QLoRA without double quantization", {"method": {"type": "QLoRA", "quantization": {"doubleQuantization": False}}}),
    ("no GPU on a CPU run", {"training": {"useCpu": True}, "compute": {"gpusPerNode": 0}}),
    ("float32 on the CPU", {"training": {"useCpu": True, "computeDtype": "float32"}}),
    ("a GPU asked for on a CPU run", {"training": {"useCpu": True}, "compute": {"gpusPerNode": 1}}),
    (
        "labels, annotations and a node selector as Kubernetes takes them",
        {
            "runtime": {
                "labels": {"team": "a", "example.com/cost-centre": "4_2.x", "empty": ""},
                "annotations": {"sidecar.istio.io/inject": "any text: {}"},
                "nodeSelector": {"topology.kubernetes.io/zone": "z1"},
            }
        },
    ),
    ("a runtime class", {"runtime": {"runtimeClassName": "nvidia"}}),
    ("an optimizer in 8 bit on a CPU", {"training": {"useCpu": True, "optimizer": {"name": "adamw_bnb_8bit"}}}),
    *(
        (f"the optimizer {name}", {"training": {"optimizer": {"name": name.value}, "scheduler": "Constant"}})
        for name in RUNNING
        if name is not OptimizerName.GALORE_ADAMW
    ),
    ("biases with LoRA", {"method": {"lora": {"bias": "All"}}}),
    ("Auto for a product", {"method": {"type": "Auto"}, "compute": {"gpu": {"product": "NVIDIA-A10G"}}}),
    ("Auto for declared memory", {"method": {"type": "Auto"}, "compute": {"gpu": {"memory": "22Gi"}}}),
    ("as many GPUs as the plan finds", {"compute": {"gpusPerNode": "Auto", "gpu": {"memory": "22Gi"}}}),
    (
        "shards over as many GPUs as the plan finds",
        {"compute": {"gpusPerNode": "Auto"}, "training": {"parallelism": "FSDP"}},
    ),
    ("several nodes", {"compute": {"nodes": 4, "gpusPerNode": 8}, "recovery": {"placementTimeoutSeconds": 60}}),
    ("shards over two nodes with one GPU each", {"compute": {"nodes": 2}, "training": {"parallelism": "FSDP"}}),
    ("a model that is kept for other jobs", {"model": {"cache": {"claimName": "models"}}}),
    ("a model that is fetched before the queue", {"model": {"cache": {"claimName": "models", "fetch": "BeforeQueue"}}}),
    (
        "a regular expression to look for",
        {"evaluation": {"generation": {"metrics": ["JSONValidity", "Regex"], "regex": "^yes"}}},
    ),
    ("prompts of one's own", {"evaluation": {"generation": {"sources": [{"uri": "s3://bucket/prompts.jsonl"}]}}}),
    (
        "a judge",
        {
            "evaluation": {
                "judge": {"endpointURL": "https://api.example.com/v1", "model": "m", "secretRef": {"name": "openai"}}
            }
        },
    ),
    ("answers without scores", {"evaluation": {"generation": {"metrics": []}}}),
    ("Auto on a CPU", {"method": {"type": "Auto"}, "training": {"useCpu": True}}),
    ("a revision of hub data", {"data": {"train": [{"uri": "hf://org/name", "revision": "v1"}]}}),
    (
        "memory that may grow",
        {"compute": {"memory": "900Mi"}, "recovery": {"outOfMemory": {"maxMemory": "1G"}}},
    ),
    (
        "one tracker of each type",
        {
            "trackers": [
                {"type": "WeightsAndBiases", "secretRef": {"name": "wandb"}, "project": "support", "runName": "tone 1"},
                {"type": "MLflow", "endpointURL": "https://mlflow.example.com/team"},
                {"type": "TensorBoard"},
                {
                    "type": "Trackio",
                    "endpointURL": "https://huggingface.co/spaces/acme/runs",
                    "secretRef": {"name": "hf"},
                },
            ]
        },
    ),
    (
        "templates of turns, of a text, and of prompts alone",
        {
            "data": {
                "train": [
                    {"uri": "s3://bucket/x.csv", "template": {"system": "s", "user": "{{ q }}", "assistant": "{{ a }}"}}
                ],
                "heldOut": {
                    "sources": [{"uri": "s3://bucket/h.csv", "format": "Text", "template": {"text": "{{ q }}"}}]
                },
            },
            "evaluation": {
                "generation": {"sources": [{"uri": "s3://bucket/p.csv", "template": {"prompt": "{{ q }}"}}]}
            },
        },
    ),
    (
        "tasks of lm-eval, and one of one's own",
        {
            "evaluation": {
                "tasks": [
                    {"name": "arc_easy", "fewShot": 5},
                    {"name": "ours", "uri": "s3://bucket/tasks/", "limit": 50},
                ]
            }
        },
    ),
    ("column mapping", {"data": {"train": [{"uri": "s3://bucket/x.csv", "columns": {"prompt": "question"}}]}}),
]

FULL: dict[str, Any] = {"method": {"type": "Full"}}
FULL_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("a rank of full weights", {"method": {"type": "Full", "lora": {"rank": 8}}}, "trains the model's own weights"),
    ("modules to save of full weights", {"method": {"type": "Full", "lora": {"modulesToSave": ["lm_head"]}}}, "trains the model's own weights"),
    ("a bias of full weights", {"method": {"type": "Full", "lora": {"bias": "All"}}}, "trains the model's own weights"),
    ("4 bit of full weights", {"method": {"type": "Full", "quantization": {"type": "FP4"}}}, "trains the model's own weights"),
    ("full without Full", {"method": {"full": {"spectrum": {}}}}, "set type: Full, or leave it out"),
    ("Spectrum and names", {"method": {"type": "Full", "full": {"spectrum": {}, "modules": ["mlp"]}}}, "takes spectrum or modules"),
    ("full weights in shards", merged(FULL, {"training": {"parallelism": "FSDP"}, "compute": {"gpusPerNode": 2}}), "keeps what it trains whole on each GPU"),
    ("full weights in host memory", merged(FULL, {"training": {"cpuOffload": "IfNeeded"}}), "keeps what it trains whole on each GPU"),
    ("a merge of full weights", merged(FULL, {"output": {"merged": {"enabled": True}}}), "publishes a whole model anyway"),
    (
        "an adapter to begin full weights with",
        merged(FULL, {"model": {"initialAdapter": {"uri": "s3://bucket/adapter"}}}),
        "merge it first",
    ),
    ("GaLore of an adapter", {"training": {"optimizer": {"name": "galore_adamw"}}}, "needs method.type: Full"),
    ("GaLore of another optimizer", merged(FULL, {"training": {"optimizer": {"galore": {"rank": 8}}}}), "galore needs name: galore_adamw"),
    ("a fraction of nothing", {"method": {"type": "Full", "full": {"spectrum": {"fraction": 0}}}}, "fraction"),
]  # fmt: skip

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("an unknown field", {"trainig": {}}, 'unknown field "spec.trainig"'),
    ("an unknown nested field", {"method": {"lora": {"r": 8}}}, 'unknown field "spec.method.lora.r"'),
    ("no model", {"model": None}, "spec.model: Required value"),
    ("no output", {"output": None}, "spec.output: Required value"),
    ("no training data", {"data": {"train": []}}, "spec.data.train"),
    ("rank 0", {"method": {"lora": {"rank": 0}}}, "spec.method.lora.rank: Invalid value: 0"),
    ("a rank of what is no name", {"method": {"lora": {"rankPattern": {"q proj": 8}}}}, "every key must be a module's name such as q_proj"),
    ("a rank of 0 for one module", {"method": {"lora": {"rankPattern": {"q_proj": 0}}}}, "spec.method.lora.rankPattern.q_proj"),
    ("a target that is a regular expression", {"method": {"lora": {"targetModules": ["(q|k)_proj"]}}}, "spec.method.lora.targetModules[0]"),
    ("early stopping without evaluations", {"evaluation": {"earlyStopping": {"patience": 2}}}, "set evaluation.intervalSteps"),
    ("packing with noise", {"training": {"packing": True, "neftuneNoiseAlpha": 5}}, "neftuneNoiseAlpha depends on how long sequences are"),
    ("a revision of an adapter in a bucket", {"model": {"uri": "hf://org/model", "initialAdapter": {"uri": "s3://b/a", "revision": "x"}}}, "revision applies to hf:// adapters only"),
    ("modules trained whole, with shards", {"method": {"lora": {"modulesToSave": ["lm_head"]}}, "training": {"cpuOffload": "Always"}}, "modulesToSave needs the whole base model"),
    ("trained tokens, with shards", {"method": {"lora": {"trainableTokens": ["<a>"]}}, "training": {"cpuOffload": "IfNeeded"}}, "model.newTokens and method.lora.trainableTokens need the whole base model"),
    ("new tokens, with shards", {"model": {"uri": "hf://org/model", "newTokens": ["<a>"]}, "compute": {"gpusPerNode": 2}, "training": {"parallelism": "FSDP"}}, "model.newTokens and method.lora.trainableTokens need the whole base model"),
    ("a new token that is white space", {"model": {"uri": "hf://org/model", "newTokens": [" "]}}, "spec.model.newTokens[0]"),
    ("a new token twice", {"model": {"uri": "hf://org/model", "newTokens": ["<a>", "<a>"]}}, "Duplicate value"),
    ("embeddings and rows of them", {"method": {"lora": {"trainableTokens": ["<a>"], "modulesToSave": ["model.embed_tokens"]}}}, "modulesToSave trains embeddings whole already"),
    ("embeddings and new tokens", {"model": {"uri": "hf://org/model", "newTokens": ["<a>"]}, "method": {"lora": {"modulesToSave": ["lm_head"]}}}, "method.lora.modulesToSave trains embeddings whole"),
    ("an adapter and new tokens", {"model": {"uri": "hf://org/model", "newTokens": ["<a>"], "initialAdapter": {"uri": "s3://bucket/adapter"}}}, "initialAdapter knows no new tokens"),
    ("an adapter and trained tokens", {"model": {"uri": "hf://org/model", "initialAdapter": {"uri": "s3://bucket/adapter"}}, "method": {"lora": {"trainableTokens": ["<a>"]}}}, "model.initialAdapter trains no tokens"),
    ("new tokens with full weights", {"model": {"uri": "hf://org/model", "newTokens": ["<a>"]}, "method": {"type": "Full"}}, "model.newTokens is for type: LoRA and QLoRA"),
    ("trained tokens with full weights", {"method": {"type": "Full", "lora": {"trainableTokens": ["<a>"]}}}, "method.lora and method.quantization do not apply"),
    ("experts with dropout", {"method": {"lora": {"targetParameters": ["mlp.experts.down_proj"]}}}, "dropout of inputs has no place: set dropout: 0"),
    ("experts with DoRA", {"method": {"lora": {"dropout": 0, "useDora": True, "targetParameters": ["mlp.experts.down_proj"]}}}, "targetParameters has no magnitudes to train"),
    ("experts with EVA", {"method": {"lora": {"dropout": 0, "initialization": "EVA", "targetParameters": ["mlp.experts.down_proj"]}}}, "targetParameters begins with initialization: Default or Gaussian"),
    ("experts of some layers", {"method": {"lora": {"dropout": 0, "layersToTransform": [1], "targetParameters": ["mlp.experts.down_proj"]}}}, "layersToTransform does not reach targetParameters"),
    ("experts with QLoRA", {"method": {"type": "QLoRA", "lora": {"dropout": 0, "targetParameters": ["mlp.experts.down_proj"]}}}, "lora.targetParameters is for type: LoRA"),
    ("experts with Auto", {"method": {"type": "Auto", "lora": {"dropout": 0, "targetParameters": ["mlp.experts.down_proj"]}}}, "lora.targetParameters is for type: LoRA"),
    ("experts in shards", {"method": {"lora": {"dropout": 0, "targetParameters": ["mlp.experts.down_proj"]}}, "training": {"cpuOffload": "Always"}}, "targetParameters needs the whole base model"),
    ("a pattern of experts", {"method": {"lora": {"dropout": 0, "targetParameters": ["mlp.experts.*"]}}}, "spec.method.lora.targetParameters[0]"),
    ("LoftQ in 16 bit", {"method": {"lora": {"initialization": "LoftQ"}}}, "LoftQ makes good for quantization: it needs type: QLoRA"),
    ("LoftQ with DoRA", {"method": {"type": "QLoRA", "lora": {"initialization": "LoftQ", "useDora": True}}}, "useDora measures the weights"),
    ("PiSSA with DoRA", {"method": {"lora": {"initialization": "PiSSA", "useDora": True}}}, "useDora and initialization: PiSSA or OLoRA each say"),
    ("OLoRA in shards", {"method": {"lora": {"initialization": "OLoRA"}}, "training": {"parallelism": "FSDP"}, "compute": {"gpusPerNode": 2}}, "PiSSA and OLoRA need the whole base model"),
    ("8 bit with double quantization", {"method": {"type": "QLoRA", "quantization": {"type": "Int8", "doubleQuantization": True}}}, "doubleQuantization is for the constants of the 4-bit types"),
    ("8 bit with LoftQ", {"method": {"type": "QLoRA", "quantization": {"type": "Int8"}, "lora": {"initialization": "LoftQ"}}}, "LoftQ makes good for what 4 bits leave"),
    ("8 bit with offload", {"method": {"type": "Auto", "quantization": {"type": "Int8"}}, "training": {"cpuOffload": "IfNeeded"}}, "Int8 needs the whole base model on each GPU"),
    ("EVA with offload", {"method": {"lora": {"initialization": "EVA"}}, "training": {"cpuOffload": "IfNeeded"}}, "EVA, LoftQ, PiSSA and OLoRA need the whole base model"),
    ("EVA and an adapter", {"model": {"uri": "hf://org/model", "initialAdapter": {"uri": "s3://bucket/adapter"}}, "method": {"lora": {"initialization": "EVA"}}}, "model.initialAdapter has weights already"),
    ("dropout 1", {"method": {"lora": {"dropout": 1}}}, "spec.method.lora.dropout"),
    ("an unknown method", {"method": {"type": "LISA"}}, 'Unsupported value: "LISA": supported values: "LoRA", "QLoRA", "Full"'),
    ("a model without scheme", {"model": {"uri": "meta-llama/Llama-3.1-8B"}}, "spec.model.uri"),
    ("output outside a bucket", {"output": {"uri": "pvc://claim/x"}}, "spec.output.uri"),
    ("plain http data", {"data": {"train": [{"uri": "http://example.com/x.jsonl"}]}}, "spec.data.train[0].uri"),
    ("both epochs and steps", {"training": {"length": {"epochs": 1, "steps": 1}}}, "exactly one of epochs, steps"),
    ("neither epochs nor steps", {"training": {"length": {}}}, "exactly one of epochs, steps"),
    ("both kinds of held-out data", {"data": {"heldOut": {"fraction": 0.1, "sources": [{"uri": "s3://bucket/h.jsonl"}]}}}, "exactly one of fraction, sources"),
    ("a weight of held-out rows", {"data": {"heldOut": {"sources": [{"uri": "s3://bucket/h.jsonl", "weight": 2}]}}}, "every held-out row counts once"),
    ("token ids to be redacted", {"data": {"train": [{"uri": "s3://bucket/x.jsonl", "format": "Tokenized"}], "checks": {"pii": "Redact"}}}, "give texts instead"),
    ("held-out token ids to be redacted", {"data": {"heldOut": {"sources": [{"uri": "s3://bucket/x.jsonl", "format": "Tokenized"}]}, "checks": {"pii": "Redact"}}}, "give texts instead"),
    ("a similarity above one", {"data": {"checks": {"nearDuplicates": {"threshold": 1.5}}}}, "spec.data.checks.nearDuplicates.threshold"),
    ("a template of two kinds", templated(prompt="a", completion="b", text="c"), "exactly one of text, prompt, user"),
    ("an answer to no question", templated(text="a", assistant="b"), "completion belongs to prompt, assistant to user"),
    ("a template that teaches nothing", templated(user="a"), "set template.completion beside prompt, template.assistant beside user"),
    ("a held-out template that teaches nothing", {"data": {"heldOut": {"sources": templated(prompt="a")["data"]["train"]}}}, "set template.completion"),
    ("a template beside columns", {"data": {"train": [{"uri": "s3://bucket/x", "template": {"text": "a"}, "columns": {"text": "b"}}]}}, "leave columns out"),
    ("a template of another format", {"data": {"train": [{"uri": "s3://bucket/x", "template": {"text": "a"}, "format": "Alpaca"}]}}, "leave format out"),
    ("an empty template", templated(text=""), "spec.data.train[0].template.text"),
    ("a weight of zero", {"data": {"train": [{"uri": "s3://bucket/x.jsonl", "weight": 0}]}}, "spec.data.train[0].weight"),
    ("a held-out fraction above one half", {"data": {"heldOut": {"fraction": 0.6}}}, "spec.data.heldOut.fraction"),
    ("a revision of a bucket", {"model": {"uri": "s3://models/llama", "revision": "main"}}, "revision applies to hf:// models only"),
    ("all-linear beside a name", {"method": {"lora": {"targetModules": ["all-linear", "q_proj"]}}}, "all-linear already names every linear layer"),
    ("a target module twice", {"method": {"lora": {"targetModules": ["q_proj", "q_proj"]}}}, "Duplicate value"),
    ("a micro-batch above the global batch", {"training": {"globalBatchSequences": 4, "microBatchSequences": 8}}, "microBatchSequences must not exceed"),
    ("no GPU without useCpu", {"compute": {"gpusPerNode": 0}}, "gpusPerNode: 0 needs training.useCpu: true"),
    ("more GPUs than one job can use", {"compute": {"gpusPerNode": 9}}, "spec.compute.gpusPerNode"),
    ("a word for a number of GPUs", {"compute": {"gpusPerNode": "all"}}, "spec.compute.gpusPerNode"),
    ("a cache for a model that lies on a volume", {"model": {"uri": "pvc://models/llama", "cache": {"claimName": "models"}}}, "cache applies to others"),
    ("no node", {"compute": {"nodes": 0}}, "spec.compute.nodes"),
    ("half a GPU", {"compute": {"gpusPerNode": 0.5}}, "spec.compute.gpusPerNode"),
    ("float16 on the CPU", {"training": {"useCpu": True, "computeDtype": "float16"}}, "computeDtype: float16 needs a GPU"),
    ("float32 on a GPU", {"training": {"computeDtype": "float32"}}, "computeDtype: float32 is for training.useCpu"),
    ("GPUs by plan for a run on the CPU", {"compute": {"gpusPerNode": "Auto"}, "training": {"useCpu": True}}, "gpusPerNode: Auto plans for GPUs"),
    ("shards on one GPU", {"training": {"parallelism": "FSDP"}}, "FSDP needs compute.gpusPerNode of at least 2"),
    ("whole copies on GPUs from host memory", {"training": {"parallelism": "DDP", "cpuOffload": "Always"}}, "cpuOffload leaves no whole copy"),
    *FULL_REFUSED,
    ("DoRA with shards", {"method": {"lora": {"useDora": True}}, "training": {"parallelism": "FSDP"}, "compute": {"gpusPerNode": 2}}, "useDora needs the whole base model"),
    ("a learning rate of zero", {"training": {"optimizer": {"learningRate": 0}}}, "spec.training.optimizer.learningRate"),
    ("a label's key with a blank", {"runtime": {"labels": {"a b": "c"}}}, "every key must be a name such as team"),
    ("a label's key without a name", {"runtime": {"labels": {"example.com/": "c"}}}, "every key must be a name such as team"),
    ("a label's key of 64 characters", {"runtime": {"labels": {"a" * 64: "c"}}}, "every key must be a name such as team"),
    ("a label's value with a blank", {"runtime": {"labels": {"a": "c d!"}}}, "spec.runtime.labels.a"),
    ("an annotation's key with a blank", {"runtime": {"annotations": {"a b": "c"}}}, "every key must be a name such as team"),
    ("a node selector's key with a blank", {"runtime": {"nodeSelector": {"a b": "c"}}}, "every key must be a name such as team"),
    ("a node selector's value with a blank", {"runtime": {"nodeSelector": {"a": "b c"}}}, "spec.runtime.nodeSelector.a"),
    ("a GPU product with a blank", {"compute": {"gpu": {"product": "NVIDIA A10G"}}}, "spec.compute.gpu.product"),
    ("a runtime class that is no name", {"runtime": {"runtimeClassName": "Not a name"}}, "spec.runtime.runtimeClassName"),
    ("biases with QLoRA", {"method": {"type": "QLoRA", "lora": {"bias": "All"}}}, "QLoRA cannot train biases, and Auto may choose it: bitsandbytes holds those of quantized layers in 16 bit"),
    ("biases with Auto", {"method": {"type": "Auto", "lora": {"bias": "All"}}, "compute": {"gpu": {"memory": "80Gi"}}}, "QLoRA cannot train biases"),
    ("an optimizer that nobody knows", {"training": {"optimizer": {"name": "adamw"}}}, 'Unsupported value: "adamw": supported values: "adamw_torch"'),
    *((f"the optimizer {name}", {"training": {"optimizer": {"name": name.value}}}, why) for names, why in REFUSED_OPTIMIZERS for name in names),
    *((f"a schedule with {name}", {"training": {"optimizer": {"name": name.value}}}, "set training.scheduler: Constant") for name in sorted(SCHEDULE_FREE)),
    ("a revision of data in a bucket", {"data": {"train": [{"uri": "s3://bucket/x.jsonl", "revision": "v1"}]}}, "revision applies to hf:// data only"),
    ("memory that may grow from nothing", {"recovery": {"outOfMemory": {"maxMemory": "8Gi"}}}, "maxMemory needs compute.memory"),
    ("memory that may grow to less", {"compute": {"memory": "1Gi"}, "recovery": {"outOfMemory": {"maxMemory": "1G"}}}, "maxMemory must not be less than compute.memory"),
    ("more failures than status can hold", {"recovery": {"maxFailures": 51}}, "spec.recovery.maxFailures"),
    ("the metric Regex without a regular expression", {"evaluation": {"generation": {"metrics": ["Regex"]}}}, "regex and the metric Regex need each other"),
    ("a regular expression that nothing looks for", {"evaluation": {"generation": {"regex": "x"}}}, "regex and the metric Regex need each other"),
    ("a weight of prompts", {"evaluation": {"generation": {"sources": [{"uri": "s3://bucket/p.jsonl", "weight": 2}]}}}, "every prompt is answered once"),
    ("prompts as token ids", {"evaluation": {"generation": {"sources": [{"uri": "s3://bucket/p.jsonl", "format": "Tokenized"}]}}}, "token ids hold none"),
    ("no prompts of one's own", {"evaluation": {"generation": {"sources": []}}}, "spec.evaluation.generation.sources"),
    ("a judge without answers", {"evaluation": {"generation": {"prompts": 0}, "judge": {"endpointURL": "https://x/v1", "model": "m"}}}, "a judge compares answers"),
    ("a judge's address with a password", {"evaluation": {"judge": {"endpointURL": "https://me:pw@x/v1", "model": "m"}}}, "spec.evaluation.judge.endpointURL"),
    ("a judge without a name", {"evaluation": {"judge": {"endpointURL": "https://x/v1"}}}, "spec.evaluation.judge.model: Required value"),
    ("an unknown metric", {"evaluation": {"generation": {"metrics": ["METEOR"]}}}, 'Unsupported value: "METEOR"'),
    ("a metric twice", {"evaluation": {"generation": {"metrics": ["BLEU", "BLEU"]}}}, "Duplicate value"),
    ("a task twice", {"evaluation": {"tasks": [{"name": "a"}, {"name": "a", "limit": 5}]}}, "Duplicate value"),
    ("a task of more documents than are done", {"evaluation": {"tasks": [{"name": "a", "limit": 10001}]}}, "spec.evaluation.tasks[0].limit"),
    ("a task that is no folder", {"evaluation": {"tasks": [{"name": "a", "uri": "s3://bucket/x.yaml"}]}}, "spec.evaluation.tasks[0].uri"),
    ("a tracker twice", {"trackers": [{"type": "TensorBoard"}, {"type": "TensorBoard"}]}, "Duplicate value"),
    ("no tracker", {"trackers": []}, "spec.trackers"),
    ("a tracker that does not exist", {"trackers": [{"type": "Comet"}]}, 'Unsupported value: "Comet"'),
    ("W&B without a key", {"trackers": [{"type": "WeightsAndBiases", "endpointURL": "https://wandb.example.com"}]}, "WeightsAndBiases needs secretRef"),
    ("MLflow nowhere", {"trackers": [{"type": "MLflow"}]}, "MLflow needs endpointURL, or secretRef"),
    ("Trackio without a token", {"trackers": [{"type": "Trackio", "endpointURL": "https://trackio.example.com"}]}, "Trackio needs secretRef"),
    ("TensorBoard with a Secret", {"trackers": [{"type": "TensorBoard", "secretRef": {"name": "x"}}]}, "TensorBoard's event files lie beside the other results"),
    ("a tracker's password in the spec", {"trackers": [{"type": "MLflow", "endpointURL": "https://me:secret@mlflow.example.com"}]}, "spec.trackers[0].endpointURL"),
    ("memory that is no quantity", {"compute": {"memory": "lots"}}, "spec.compute.memory"),
]  # fmt: skip

IMMUTABLE: list[tuple[str, dict[str, Any], str]] = [
    ("the model", {"model": {"uri": "hf://other/model"}}, "model is immutable"),
    ("the data", {"data": {"train": [{"uri": "s3://bucket/other.jsonl"}]}}, "data is immutable"),
    ("the method", {"method": {"type": "QLoRA"}}, "method is immutable"),
    ("the training", {"training": {"seed": 1}}, "training is immutable"),
    ("the output", {"output": {"uri": "s3://elsewhere"}}, "output is immutable"),
    ("the objective", {"objective": {"sft": {"lossOn": "All"}}}, "objective is immutable"),
    ("the evaluation", {"evaluation": {"generation": {"prompts": 5}}}, "evaluation is immutable"),
    ("the resources", {"compute": {"memory": "8Gi"}}, "compute is immutable"),
    ("the recovery", {"recovery": {"maxFailures": 0}}, "recovery is immutable"),
    ("the runtime", {"runtime": {"image": "other:1"}}, "runtime is immutable"),
    ("the queue", {"queue": {"name": "other"}}, "queue is immutable"),
    ("the trackers", {"trackers": [{"type": "TensorBoard"}]}, "trackers is immutable"),
]

CHANGEABLE: list[tuple[str, dict[str, Any]]] = [
    ("suspend", {"suspend": True}),
    ("the deadline", {"activeDeadlineSeconds": 60}),
    ("the pending timeout", {"pendingTimeoutSeconds": 60}),
    ("the time to live", {"ttlSecondsAfterFinished": 60}),
]


def job(name: str, spec: dict[str, Any]) -> str:
    """The manifest as YAML."""
    return yaml.safe_dump(
        {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
    )


@pytest.mark.parametrize(("case", "patch"), ACCEPTED, ids=[c[0] for c in ACCEPTED])
def test_accepts(apiserver: ApiServer, case: str, patch: dict[str, Any]) -> None:
    result = apiserver.kubectl("apply", "--dry-run=server", "-f", "-", stdin=job("a", merged(MINIMAL, patch)))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("case", "patch", "words"), REFUSED, ids=[c[0] for c in REFUSED])
def test_refuses(apiserver: ApiServer, case: str, patch: dict[str, Any], words: str) -> None:
    result = apiserver.kubectl("apply", "--dry-run=server", "-f", "-", stdin=job("a", merged(MINIMAL, patch)))
    assert result.returncode != 0
    assert words in result.stderr


@pytest.mark.parametrize(
    ("name", "words"), [("a" * 41, "at most 40 characters"), ("a.b", "must be a DNS label")], ids=["too long", "a dot"]
)
def test_refuses_names_whose_pods_would_have_no_hostname(apiserver: ApiServer, name: str, words: str) -> None:
    result = apiserver.kubectl("apply", "--dry-run=server", "-f", "-", stdin=job(name, MINIMAL))
    assert result.returncode != 0
    assert words in result.stderr


@pytest.fixture(scope="module")
def existing(apiserver: ApiServer) -> str:
    """A job that stands."""
    apiserver.kubectl("apply", "-f", "-", stdin=job("standing", MINIMAL)).check_returncode()
    return "standing"


@pytest.mark.parametrize(("case", "patch", "words"), IMMUTABLE, ids=[c[0] for c in IMMUTABLE])
def test_refuses_to_change(apiserver: ApiServer, existing: str, case: str, patch: dict[str, Any], words: str) -> None:
    result = apiserver.kubectl("apply", "--dry-run=server", "-f", "-", stdin=job(existing, merged(MINIMAL, patch)))
    assert result.returncode != 0
    assert words in result.stderr


@pytest.mark.parametrize(("case", "patch"), CHANGEABLE, ids=[c[0] for c in CHANGEABLE])
def test_lets_change(apiserver: ApiServer, existing: str, case: str, patch: dict[str, Any]) -> None:
    result = apiserver.kubectl("apply", "--dry-run=server", "-f", "-", stdin=job(existing, merged(MINIMAL, patch)))
    assert result.returncode == 0, result.stderr


def test_every_example_can_be_applied(apiserver: ApiServer) -> None:
    result = apiserver.kubectl("apply", "--dry-run=server", "-f", "examples/")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("created") >= 3


def test_short_name_category_and_columns(apiserver: ApiServer, existing: str) -> None:
    listed = apiserver.kubectl("get", "ftj", existing).stdout
    for column in ("NAME", "PHASE", "MODEL", "METHOD", "PROGRESS", "LOSS", "ETA", "AGE"):
        assert column in listed
    assert existing in apiserver.kubectl("get", "all").stdout


def test_a_field_the_schema_does_not_know_is_dropped_only_where_the_client_does_not_ask(apiserver: ApiServer) -> None:
    """Docs tell other clients to ask for fieldValidation=Strict; this is what they get without."""
    spec = merged(MINIMAL, {"trainig": {}})
    loose = apiserver.kubectl("apply", "--validate=ignore", "--dry-run=server", "-f", "-", stdin=job("a", spec))
    assert loose.returncode == 0, loose.stderr
