"""Models from every kind of source: resumed, checked, and with errors that have names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.sources.model import ModelSource, resolve_model
from tests.support.hub_server import COMMIT, VALID_TOKEN, WEAK_TOKEN, HubServer
from tests.support.tiny_model import build_tiny_model
from tests.support.tls import localhost_certificate
from tests.support.trainer_run import Pod
from tests.trainer.conftest import S3

CONFIG_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
SPEC: dict[str, Any] = {"data": {"train": [{"uri": "s3://bucket/x"}]}, "output": {"uri": "s3://bucket/out"}}


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def model(pod: Pod, uri: str, **fields: Any) -> ModelSource:
    return resolve_model(pod.context({**SPEC, "model": {"uri": uri, **fields}}))


def hub_model(pod: Pod, hub: HubServer, token: str | None = None, **fields: Any) -> ModelSource:
    if token is not None:
        fields["secretRef"] = {"name": "hf"}
        (pod.secrets / "model").mkdir(parents=True, exist_ok=True)
        (pod.secrets / "model" / "HF_TOKEN").write_text(f"{token}\n")
    return model(pod, fields.pop("uri", "hf://org/tiny"), endpointURL=hub.endpoint, **fields)


@pytest.fixture
def published(hub: HubServer, tiny_model: Path) -> HubServer:
    hub.add_model("org/tiny", tiny_model)
    return hub


def test_every_kind_of_source_gives_the_same_files_and_shapes(
    pod: Pod, published: HubServer, s3: S3, tiny_model: Path, tmp_path: Path
) -> None:
    bucket = s3.new_bucket()
    s3.put_dir(bucket, "models/tiny", tiny_model)
    s3.write_secret(pod.secrets / "model")
    (pod.volumes / "models").mkdir(parents=True)
    (pod.volumes / "models" / "tiny").symlink_to(tiny_model)
    build_tiny_model(pod.volumes / "models" / "copy")
    sources = [
        hub_model(pod, published),
        model(pod, f"s3://{bucket}/models/tiny/", secretRef={"name": "s3"}),
        model(pod, "pvc://models/copy"),
    ]
    first = sources[0].safetensors_headers()
    assert first["model.layers.0.self_attn.k_proj.weight"] == ("F32", (32, 64))
    for number, source in enumerate(sources):
        assert [f.path for f in source.list_files()] == sorted([*CONFIG_FILES, "model.safetensors"])
        assert source.safetensors_headers() == first
        folder = source.fetch(tmp_path / f"m{number}", weights=True)
        for name in [*CONFIG_FILES, "model.safetensors"]:
            assert (folder / name).read_bytes() == (tiny_model / name).read_bytes()
    assert sources[0].commit == COMMIT
    assert sources[1].commit is None
    assert sorted(p.name for p in (tmp_path / "m0").iterdir()) == sorted([*CONFIG_FILES, "model.safetensors"])


def test_a_link_out_of_the_volume_is_refused(pod: Pod, tiny_model: Path) -> None:
    (pod.volumes / "models").mkdir(parents=True)
    (pod.volumes / "models" / "tiny").symlink_to(tiny_model)
    with pytest.raises(StageError, match="leads out of the volume"):
        model(pod, "pvc://models/tiny")


def test_shapes_are_read_without_the_weights(pod: Pod, published: HubServer) -> None:
    hub_model(pod, published).safetensors_headers()
    ranges = [r for _, path, r, _ in published.log.requests if path.endswith(".safetensors")]
    assert ranges
    assert all(ranges)


def test_sharded_weights_are_read_through_their_index(pod: Pod, hub: HubServer, s3: S3, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "sharded", shards=3)
    hub.add_model("org/tiny", folder)
    bucket = s3.new_bucket()
    s3.put_dir(bucket, "m", folder)
    s3.write_secret(pod.secrets / "model")
    by_hub, by_s3 = hub_model(pod, hub), model(pod, f"s3://{bucket}/m", secretRef={"name": "s3"})
    assert len(by_hub.weight_files()) == 3
    assert by_hub.safetensors_headers() == by_s3.safetensors_headers()
    assert len(by_hub.safetensors_headers()) == 21
    s3.client.delete_object(Bucket=bucket, Key="m/model-00002-of-00003.safetensors")
    with pytest.raises(StageError, match=r"lacks model-00002-of-00003\.safetensors") as info:
        model(pod, f"s3://{bucket}/m", secretRef={"name": "s3"}).safetensors_headers()
    assert info.value.reason is Reason.UNSUPPORTED_MODEL


def test_only_needed_files_are_fetched_and_code_only_when_trusted(pod: Pod, hub: HubServer, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "repo")
    for name in ("pytorch_model.bin", "model.gguf", "README.md", "modeling_x.py", "consolidated.safetensors"):
        (folder / name).write_text("x")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    hub.add_model("org/tiny", folder)
    needed = sorted([*CONFIG_FILES, "model.safetensors"])
    assert [f.path for f in hub_model(pod, hub).list_files()] == needed
    trusted = hub_model(pod, hub, trustRemoteCode=True)
    assert [f.path for f in trusted.list_files()] == sorted([*needed, "modeling_x.py"])


def test_pickles_alone_are_an_unsupported_model(pod: Pod, hub: HubServer, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "repo")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.add_model("org/tiny", folder)
    with pytest.raises(StageError, match=r"it has pytorch_model\.bin") as info:
        hub_model(pod, hub).list_files()
    assert info.value.reason is Reason.UNSUPPORTED_MODEL


def test_a_dropped_connection_is_resumed_within_a_file(
    pod: Pod, published: HubServer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # huggingface_hub resumes in steps of 10 MB
    source = hub_model(pod, published)
    published.faults.drop_after_bytes, published.faults.drops = 200_000, 2
    moved: list[int] = []
    folder = source.fetch(tmp_path / "m", weights=True, on_bytes=moved.append)
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert published.faults.drops == 0
    assert any(r == "bytes=200000-" for _, _, r, _ in published.log.requests)
    assert sum(moved) == sum(p.stat().st_size for p in folder.iterdir())


def test_wrong_bytes_are_noticed_and_read_again(
    pod: Pod, published: HubServer, tiny_model: Path, tmp_path: Path
) -> None:
    source = hub_model(pod, published)
    published.faults.corrupt = 1
    folder = source.fetch(tmp_path / "m", weights=True)
    for name in CONFIG_FILES:
        assert (folder / name).read_bytes() == (tiny_model / name).read_bytes()
    published.faults.corrupt = 99
    with pytest.raises(StageError, match="another hash") as info:
        source.fetch(tmp_path / "n", weights=True)
    assert info.value.reason is Reason.HUB_UNAVAILABLE


def test_what_was_fetched_is_not_fetched_again(pod: Pod, published: HubServer, tmp_path: Path) -> None:
    source = hub_model(pod, published)
    source.fetch(tmp_path / "m", weights=True)
    published.log.requests.clear()
    source.fetch(tmp_path / "m", weights=True)
    assert published.log.requests == []


def test_a_gated_model_needs_a_token_on_its_list(pod: Pod, hub: HubServer, tiny_model: Path, tmp_path: Path) -> None:
    hub.add_model("org/tiny", tiny_model, gated=True)
    for token in (None, WEAK_TOKEN):
        with pytest.raises(StageError, match="is gated") as info:
            hub_model(pod, hub, token).safetensors_headers()
        assert info.value.reason is Reason.GATED_MODEL
        with pytest.raises(StageError) as info:
            hub_model(pod, hub, token).fetch(tmp_path / "m", weights=False)
        assert info.value.reason is Reason.GATED_MODEL
    assert hub_model(pod, hub, VALID_TOKEN).safetensors_headers()
    cdn = [auth for _, path, _, auth in hub.log.requests if path.startswith("/cdn/")]
    assert cdn
    assert not any(cdn), "the token must never reach the CDN"


@pytest.mark.parametrize(
    ("token", "fields", "private", "reason", "text"),
    [
        (
            None,
            {"uri": "hf://org/nothing"},
            False,
            Reason.MODEL_NOT_FOUND,
            "hf://org/nothing does not exist, or is private",
        ),
        (None, {}, True, Reason.MODEL_NOT_FOUND, "a request without token may not read it"),
        (WEAK_TOKEN, {}, True, Reason.MODEL_NOT_FOUND, "the token in the Secret may not read it"),
        (None, {"revision": "v9"}, False, Reason.MODEL_NOT_FOUND, "has no revision 'v9'"),
        ("hf_wrong", {}, False, Reason.ACCESS_DENIED, "the token in the Secret was refused (401"),
    ],
    ids=["no such repository", "private, no token", "private, other token", "no such revision", "wrong token"],
)
def test_what_the_hub_refuses_has_a_name(
    pod: Pod,
    hub: HubServer,
    tiny_model: Path,
    token: str | None,
    fields: dict[str, Any],
    private: bool,
    reason: Reason,
    text: str,
) -> None:
    hub.add_model("org/tiny", tiny_model, private=private)
    with pytest.raises(StageError) as info:
        hub_model(pod, hub, token, **fields)
    assert info.value.reason is reason
    assert text in info.value.message


def test_an_unreachable_or_failing_hub_is_waited_for(pod: Pod, published: HubServer, tmp_path: Path) -> None:
    published.faults.unavailable = -1
    with pytest.raises(StageError) as info:
        hub_model(pod, published)
    assert info.value.reason is Reason.HUB_UNAVAILABLE
    with pytest.raises(StageError) as info:
        model(pod, "hf://org/tiny", endpointURL="http://127.0.0.1:9")
    assert info.value.reason is Reason.HUB_UNAVAILABLE
    assert "http://127.0.0.1:9" in info.value.message


def test_the_endpoint_may_stand_in_the_secret(pod: Pod, published: HubServer) -> None:
    (pod.secrets / "model").mkdir(parents=True)
    (pod.secrets / "model" / "HF_ENDPOINT").write_text(published.endpoint)
    assert model(pod, "hf://org/tiny", secretRef={"name": "mirror"}).commit == COMMIT


def test_a_missing_token_is_waited_for(pod: Pod, hub: HubServer) -> None:
    with pytest.raises(
        StageError, match=r"Secret hf .* does not exist or is empty; expected the keys HF_TOKEN"
    ) as info:
        model(pod, "hf://org/tiny", endpointURL=hub.endpoint, secretRef={"name": "hf"})
    assert info.value.reason is Reason.SECRET_MISSING


def test_a_commit_given_by_an_earlier_stage_beats_the_branch(pod: Pod, published: HubServer) -> None:
    ctx = pod.context(
        {**SPEC, "model": {"uri": "hf://org/tiny", "revision": "gone", "endpointURL": published.endpoint}}
    )
    assert resolve_model(ctx, COMMIT).commit == COMMIT


def test_missing_models_in_buckets_and_volumes(pod: Pod, s3: S3) -> None:
    s3.write_secret(pod.secrets / "model")
    bucket = s3.new_bucket()
    for uri, reason in (
        (f"s3://{bucket}/none", Reason.MODEL_NOT_FOUND),
        ("s3://no-such-bucket/none", Reason.BUCKET_NOT_FOUND),
        ("pvc://claim/none", Reason.MODEL_NOT_FOUND),
    ):
        with pytest.raises(StageError) as info:
            model(pod, uri, secretRef={"name": "s3"})
        assert info.value.reason is reason, uri


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 100, b"\x10" + bytes(7) + b"not json at all!"])
def test_a_file_that_is_no_safetensors_file_is_an_unsupported_model(pod: Pod, content: bytes) -> None:
    folder = pod.volumes / "models" / "bad"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(StageError) as info:
        model(pod, "pvc://models/bad").safetensors_headers()
    assert info.value.reason is Reason.UNSUPPORTED_MODEL


def test_a_mirror_with_a_private_ca_is_trusted_by_the_secret(pod: Pod, tiny_model: Path, tmp_path: Path) -> None:
    ca, tls = localhost_certificate(tmp_path / "tls")
    with HubServer(tls) as server:
        server.add_model("org/tiny", tiny_model)
        with pytest.raises(StageError, match="certificate verify failed") as info:
            hub_model(pod, server, VALID_TOKEN)
        assert info.value.reason is Reason.HUB_UNAVAILABLE
        (pod.secrets / "model" / "AWS_CA_BUNDLE").write_text(ca.read_text())
        folder = hub_model(pod, server, VALID_TOKEN).fetch(tmp_path / "m", weights=True)
        assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
