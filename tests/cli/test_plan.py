"""``finetune plan`` answers with its exit code, and says in its output why."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from finetune_api.failures import Reason
from finetune_api.planner import Shapes
from finetune_cli.__main__ import app
from finetune_trainer.errors import StageError
from tests.planner.cases import model
from tests.planner.simulator.golden import read_config
from tests.planner.test_examples import CONFIGS, PLANS
from tests.support.prepared import deep_merge, job_spec
from tests.trainer.test_prepare_plan import gpu, planned

FITS, BAD_INPUT, DOES_NOT_FIT = 0, 2, 3
EXAMPLES = Path(__file__).parents[2] / "examples"
JOB = """
apiVersion: v1
kind: ConfigMap
metadata: {name: other}
---
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support-tone}
spec:
  model: {uri: "hf://meta-llama/Meta-Llama-3-8B"}
  data: {train: [{uri: "s3://acme/train.jsonl"}]}
  output: {uri: "s3://acme/models"}
  training: {optimizer: {learningRate: 1e-4}, length: {steps: 100}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read_config("llama-3-8b")))
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def job(folder: Path, text: str = JOB) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def write_headers(folder: Path, shapes: Shapes) -> None:
    """A safetensors file without its numbers."""
    header = {name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def test_a_job_that_fits_exits_0_with_a_table_and_a_sentence(tmp_path: Path, config: Path) -> None:
    result = run(job(tmp_path), "--config", config, "--gpu", "NVIDIA A100 SXM4 80GB")
    assert result.exit_code == FITS
    assert "quantization constants" not in result.stdout
    assert "peak of loading" in result.stdout
    assert "LoRA on 1 × NVIDIA A100 SXM4 80GB: peak " in result.stdout
    assert "41,943,040 trainable parameters (0.52 %)" in result.stdout
    assert "GPU-hours" in result.stdout
    assert re.search(r"About \d+ minutes by estimate", result.stdout)


def test_a_job_that_does_not_fit_exits_3_and_says_what_would(tmp_path: Path, config: Path) -> None:
    result = run(job(tmp_path), "--config", config, "--gpu-memory", "16Gi")
    assert result.exit_code == DOES_NOT_FIT
    assert "too little. It fits with: method.type: QLoRA (" in result.stdout


def test_auto_takes_what_fits(tmp_path: Path, config: Path) -> None:
    result = run(job(tmp_path), "--config", config, "--gpu-memory", "16Gi", "--method", "Auto", "--json")
    assert result.exit_code == FITS
    plan = json.loads(result.stdout)
    assert plan["method"] == "QLoRA"
    assert plan["fit"]["fits"]
    assert plan["planned"]["trainableParameters"] == 41_943_040


def test_the_files_own_gpus_are_planned_for_unless_others_are_named(tmp_path: Path, config: Path) -> None:
    text = JOB + "  compute: {gpusPerNode: 2, gpu: {memory: 80Gi}}"
    result = run(job(tmp_path, text), "--config", config)
    assert result.exit_code == FITS
    assert "LoRA on 2 × GPU with 80Gi: " in result.stdout
    other = run(job(tmp_path, text), "--config", config, "--gpus", "1", "--gpu", "NVIDIA A100 SXM4 80GB")
    assert "LoRA on 1 × NVIDIA A100 SXM4 80GB: " in other.stdout


def test_auto_takes_the_fewest_gpus_that_it_fits_on(tmp_path: Path, config: Path) -> None:
    text = JOB + "  compute: {gpusPerNode: Auto}"
    assert "LoRA on 1 × NVIDIA A100" in run(job(tmp_path, text), "--config", config, "--gpu", "A100-SXM4-80GB").stdout
    several = run(job(tmp_path, text), "--config", config, "--gpu-memory", "12Gi", "--json")
    assert several.exit_code == FITS
    request = json.loads(several.stdout)["request"]
    assert request["layout"] == "FSDP"
    assert request["gpus"] > 1
    fewer = run(job(tmp_path), "--config", config, "--gpu-memory", "12Gi", "--gpus", str(request["gpus"] - 1))
    assert fewer.exit_code == DOES_NOT_FIT


def test_a_base_in_host_memory_is_planned_and_must_have_room_there(tmp_path: Path, config: Path) -> None:
    text = JOB.replace("training: {", "training: {cpuOffload: IfNeeded, ") + "  compute: {memory: %s}"
    roomy = run(job(tmp_path, text % "64Gi"), "--config", config, "--gpu-memory", "12Gi", "--json")
    assert roomy.exit_code == FITS, roomy.stdout
    assert json.loads(roomy.stdout)["request"]["layout"] == "CPUOffload"
    narrow = run(job(tmp_path, text % "8Gi"), "--config", config, "--gpu-memory", "12Gi")
    assert narrow.exit_code == DOES_NOT_FIT
    assert "compute.memory: 8Gi is" in narrow.stdout


def as_prepared(folder: Path, name: str, spec: dict[str, Any], *options: str) -> Result:
    """What the command says of the job that ``planned`` is asked for."""
    asked = deep_merge(job_spec(None, "bucket", training={"useCpu": False}), spec)
    whole = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "job"}, "spec": asked}
    (folder / "config.json").write_text(json.dumps(read_config(name)))
    return run(job(folder, yaml.safe_dump(whole)), "--config", folder / "config.json", *options)


ONE = {"compute": gpu("NVIDIA-A100-SXM4-80GB")}
TWO = {"compute": gpu("NVIDIA-A100-SXM4-80GB", count=2)}
SMALL = {"compute": gpu("Tesla-T4")}
OWN_MICRO_BATCH = {"globalBatchSequences": 16, "maxSequenceTokens": 2048, "microBatchSequences": None}


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *(
            ("llama-3-8b", {"compute": gpu("NVIDIA-A100-SXM4-80GB", count=count), "training": OWN_MICRO_BATCH})
            for count in (1, 3, 6, 7)
        ),
        ("llama-3-8b", {"compute": gpu(memory="10Gi"), "method": {"type": "Auto"}}),
        ("llama-2-70b", {"compute": gpu("NVIDIA-A100-SXM4-80GB", count="Auto")}),
        ("llama-3-8b", {**TWO, "training": {"parallelism": "FSDP"}}),
        ("llama-3-8b", {"compute": gpu("NVIDIA-A10G"), "training": {"cpuOffload": "Always"}}),
        ("mixtral-8x7b", {"compute": gpu("NVIDIA-H200", count=2)}),
        ("mixtral-8x7b", {**SMALL, "training": {"cpuOffload": "IfNeeded"}}),
    ],
)
def test_a_job_has_the_plan_that_its_prepare_stage_makes(tmp_path: Path, name: str, spec: dict[str, Any]) -> None:
    """Also where that is an estimate that does not fit."""
    result = as_prepared(tmp_path, name, spec, "--json")
    assert result.exit_code == FITS, result.stderr
    told, plan = json.loads(result.stdout), planned(name, **spec)
    assert plan is not None
    assert told["reason"] in plan.summary
    assert (told["method"], told["request"]["layout"]) == (plan.method, plan.layout)
    assert told["request"]["gpus"] == plan.gpus_per_node
    assert told["fit"]["neededBytes"] == plan.needed_bytes
    split = (plan.split.micro_batch_sequences, plan.split.gradient_accumulation_steps)
    assert (told["microBatchSequences"], told["gradientAccumulationSteps"]) == split


@pytest.mark.parametrize(
    ("name", "spec", "code"),
    [
        ("llama-3-8b", SMALL, DOES_NOT_FIT),
        ("llama-2-70b", {**TWO, "training": {"parallelism": "DDP"}}, DOES_NOT_FIT),
        (
            "llama-2-70b",
            {
                "compute": {**gpu("NVIDIA-A10G"), "memory": "16Gi"},
                "method": {"type": "QLoRA"},
                "training": {"cpuOffload": "Always"},
            },
            DOES_NOT_FIT,
        ),
        ("mixtral-8x7b", {**TWO, "training": {"parallelism": "FSDP"}}, BAD_INPUT),
        ("mixtral-8x7b", {**ONE, "training": {"cpuOffload": "Always"}}, BAD_INPUT),
        ("llama-3-8b", {**SMALL, "training": {"computeDtype": "bfloat16"}}, BAD_INPUT),
    ],
)
def test_what_the_prepare_stage_refuses_is_refused_in_its_words(
    tmp_path: Path, name: str, spec: dict[str, Any], code: int
) -> None:
    with pytest.raises(StageError) as refused:
        planned(name, **spec)
    result = as_prepared(tmp_path, name, spec)
    assert result.exit_code == code
    assert refused.value.reason is (Reason.DOES_NOT_FIT if code == DOES_NOT_FIT else Reason.INVALID_CONFIG)
    words = refused.value.message.removeprefix(f"hf://org/{name}")
    assert words in (result.stdout if code == DOES_NOT_FIT else result.stderr)


def test_an_estimate_that_does_not_fit_is_told_and_refuses_nothing(tmp_path: Path) -> None:
    result = as_prepared(tmp_path, "mixtral-8x7b", SMALL)
    assert result.exit_code == FITS
    assert "too little. It fits with: " in result.stdout
    assert "not verified for this family it does not fit. An estimate refuses nothing." in result.stdout


def test_an_estimate_refuses_nothing_for_host_memory_either(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**read_config("llama-3-8b"), "model_type": "novel"}))
    write_headers(tmp_path, model("llama-3-8b")[1])
    text = JOB + "  method: {type: Full}\n  compute: {memory: 8Gi}\n"
    small = run(job(tmp_path, text), "--model-folder", tmp_path, "--gpu", "T4")
    assert small.exit_code == FITS, "it does not fit by an estimate, and what host memory it would need is not asked"
    assert "An estimate refuses nothing." in small.stdout
    large = run(job(tmp_path, text), "--model-folder", tmp_path, "--gpu-memory", "999Gi")
    assert large.exit_code == DOES_NOT_FIT
    assert "compute.memory: 8Gi is" in large.stdout


def test_qlora_that_would_quantize_nothing_is_refused_and_little_of_it_is_told(tmp_path: Path) -> None:
    large = {"compute": gpu("NVIDIA-H200"), "method": {"type": "QLoRA"}}
    refused = as_prepared(tmp_path, "falcon-7b", large)
    assert refused.exit_code == BAD_INPUT
    assert "QLoRA would leave all of s3://bucket/base in 16 bit" in refused.stderr
    told = as_prepared(tmp_path, "mixtral-8x7b", large)
    assert told.exit_code == FITS
    assert "warning: QLoRA leaves 97% of its layers' weights in 16 bit" in told.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["LlamaModel"]}, "is a LlamaModel; expected a causal language model"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantized already (awq)"),
    ],
)
def test_a_model_that_cannot_be_tuned_exits_2(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**read_config("llama-3-8b"), **settings}))
    result = run(job(tmp_path), "--config", tmp_path / "config.json", "--gpu", "A100-SXM4-80GB")
    assert result.exit_code == BAD_INPUT
    assert message in result.stderr


@pytest.mark.parametrize(("prefix", "code"), [("transformer.", FITS), ("", BAD_INPUT)])
def test_what_is_loaded_by_layers_is_known_by_the_names_in_the_files(tmp_path: Path, prefix: str, code: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(read_config("gpt2")))
    names = {f"{prefix}{name.removeprefix('transformer.')}": shape for name, shape in model("gpt2")[1].items()}
    write_headers(tmp_path, names)
    text = JOB.replace("training: {", "training: {parallelism: FSDP, ") + "  compute: {gpusPerNode: 2}"
    result = run(job(tmp_path, text), "--model-folder", tmp_path, "--gpu", "a10g")
    assert result.exit_code == code, result.stderr
    assert ("parallelism: FSDP: this model is none that can be loaded" in result.stderr) == (code == BAD_INPUT)


def test_a_learning_rate_of_1e_4_is_a_number_as_kubectl_reads_it(tmp_path: Path, config: Path) -> None:
    assert run(job(tmp_path), "--config", config, "--gpu", "a100-sxm4-80gb").exit_code == FITS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("a: 1", "has 0 documents of kind FineTuneJob; expected one"),
        (JOB + "---" + JOB, "has 2 documents of kind FineTuneJob; expected one"),
        (JOB.replace("v1alpha1", "v9"), "apiVersion is 'finetune.dev/v9'; expected finetune.dev/v1alpha1"),
        (JOB.replace("training:", "trainig:"), "spec.trainig: Extra inputs are not permitted"),
        (
            JOB + "  method: {lora: {rank: 0}}",
            "spec.method.lora.rank: Input should be greater than or equal to 1 (found 0)",
        ),
        (JOB + '  method: {lora: {rank: "8"}}', "spec.method.lora.rank: Input should be a valid integer (found '8')"),
        (JOB.replace("1e-4", '"1e-4"'), "learningRate: Input should be a valid number (found '1e-4')"),
        (
            JOB + "  method: {lora: {targetModules: [c_attn]}}",
            "c_attn is none of this model's linear layers, which are ",
        ),
    ],
)
def test_a_file_that_cannot_be_used_exits_2_and_says_where(
    tmp_path: Path, config: Path, text: str, message: str
) -> None:
    result = run(job(tmp_path, text), "--config", config, "--gpu", "a10g")
    assert result.exit_code == BAD_INPUT
    assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "a10g"], "expected one of --config and --model-folder"),
        (["--config", "CONFIG"], "expected --gpu or --gpu-memory"),
        (["--config", "CONFIG", "--gpu", "Voodoo 2"], "Voodoo 2 is not in the table of GPUs"),
        (["--config", "CONFIG", "--gpu-memory", "much"], "'much' is not a quantity of memory"),
        (["--config", "/nowhere/config.json", "--gpu", "a10g"], "/nowhere/config.json cannot be read"),
        (["--gpus", "0", "--config", "CONFIG", "--gpu", "a10g"], "--gpus"),
    ],
)
def test_an_option_that_cannot_be_used_exits_2(tmp_path: Path, config: Path, options: list[str], message: str) -> None:
    result = run(job(tmp_path), *[str(config) if o == "CONFIG" else o for o in options])
    assert result.exit_code == BAD_INPUT
    assert message in result.stderr


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"model_type": "llama", "hidden_size": "big"}'])
def test_a_config_that_is_no_decoders_exits_2(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    result = run(job(tmp_path), "--config", tmp_path / "config.json", "--gpu", "a10g")
    assert result.exit_code == BAD_INPUT
    assert "config.json" in result.stderr


def test_an_unknown_family_needs_its_headers(tmp_path: Path) -> None:
    """With them its parameters are counted exactly, and the plan says that activations are an estimate."""
    (tmp_path / "config.json").write_text(json.dumps({**read_config("smollm2-135m"), "model_type": "novel"}))
    refused = run(job(tmp_path), "--config", tmp_path / "config.json", "--gpu", "a10g")
    assert refused.exit_code == BAD_INPUT
    assert "Give --model-folder with its safetensors files" in refused.stderr
    write_headers(tmp_path, model("smollm2-135m")[1])
    result = run(job(tmp_path), "--model-folder", tmp_path, "--gpu", "a10g", "--json")
    assert result.exit_code == FITS
    planned = json.loads(result.stdout)["planned"]
    assert planned["totalParameters"] == 134_515_008
    assert planned["verified"] is False


def test_a_file_that_is_not_safetensors_exits_2(tmp_path: Path, config: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    result = run(job(tmp_path), "--model-folder", config.parent, "--gpu", "a10g")
    assert result.exit_code == BAD_INPUT
    assert "model.safetensors is not a safetensors file" in result.stderr


JOBS = sorted(path for path in EXAMPLES.glob("*.yaml") if "kind: FineTuneJob" in path.read_text())


@pytest.mark.parametrize("example", JOBS, ids=lambda path: path.stem)
def test_every_example_can_be_planned(example: Path, config: Path) -> None:
    assert run(example, "--config", config, "--gpu", "H100-80GB-HBM3").exit_code == FITS


@pytest.mark.parametrize("name", sorted(PLANS))
def test_an_example_of_a_70b_fits_the_gpus_that_it_names(tmp_path: Path, name: str) -> None:
    """Offline as in the prepare stage."""
    example = EXAMPLES / f"{name}.yaml"
    [config] = {file for uri, file in CONFIGS.items() if uri in example.read_text()}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read_config(config.removesuffix(".json"))))
    result = run(example, "--config", path)
    assert result.exit_code == FITS, result.stdout
    assert f"peak {PLANS[name]['needsGiB']} GiB of {PLANS[name]['usableGiB']} usable" in result.stdout
