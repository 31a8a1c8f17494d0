"""``make demo``: everything from an empty machine to a verified adapter in a bucket. ``python -m demo up|env|images|down``."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer

from demo import images, install, show, store
from demo.follow import Run, follow, is_true
from demo.target import (
    CRDS,
    NAMESPACE,
    RELEASE,
    ROOT,
    SYSTEM_NAMESPACE,
    DemoError,
    Target,
    current_target,
    existing_target,
)
from finetune_cluster.console import ClusterError
from finetune_cluster.locks import write_atomically
from finetune_cluster.paths import cache_root

Result = TypeVar("Result")
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
JOB = "quickstart"


class Steps:
    """Prints each step with its duration."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []

    def __call__(self, title: str, action: Callable[[], Result]) -> Result:
        """Run one step."""
        print(f"==> {title}", flush=True)
        started = time.monotonic()
        result = action()
        self.times.append((title, time.monotonic() - started))
        return result

    def table(self) -> str:
        """All steps with seconds."""
        total = sum(seconds for _, seconds in self.times)
        rows = [f"{seconds:7.1f} s  {title}" for title, seconds in self.times]
        return "\n".join([*rows, f"{total:7.1f} s  in all"])


@app.command()
def up() -> None:
    """Set everything up, run examples/quickstart.yaml, and show what came out."""
    steps = Steps()
    if existing_target() is None:
        steps("local cluster", install.cluster_up)
    target = current_target()
    references = steps("images", lambda: images.ensure(target))
    steps("object store", lambda: install.install_store(target, references))
    model = steps("base model (SmolLM2-135M-Instruct)", install.model_folder)
    data = steps("dataset (Kubernetes API documentation)", install.dataset_folder)
    with store.access(target) as access:
        client = access.client()
        steps("upload model and dataset", lambda: install.upload(client, model, data))
        steps("operator (Helm chart)", lambda: install.install_operator(target, references))
        run = steps("kubectl apply -f examples/quickstart.yaml", lambda: run_job(target))
        report(client, run.job)
    print("\nFrom apply to the first training step: " + run.to_first_step())
    print("\nTime per step\n" + steps.table())
    print('\nPlay on: eval "$(make -s demo-env)"; README, "A second job". Clean up: make demo-down')
    if not is_true(run.job, "Complete"):
        raise DemoError(
            f"FineTuneJob {JOB} did not complete; see above, and `kubectl describe ftj {JOB} -n {NAMESPACE}`"
        )


def run_job(target: Target) -> Run:
    """Apply the example (an earlier run of it goes first) and follow it to its end."""
    target.kubectl("delete", "ftj", JOB, "-n", NAMESPACE, "--ignore-not-found", "--cascade=foreground")
    target.kubectl("apply", "-n", NAMESPACE, "-f", str(ROOT / "examples" / "quickstart.yaml"))
    return follow(target, NAMESPACE, JOB)


def report(client: Any, job: dict[str, Any]) -> None:
    """Status, bucket, losses and answers."""
    print("\nStatus\n" + show.status_text(job))
    if "artifacts" not in job["status"] or not is_true(job, "Complete"):
        return
    bucket, _, prefix = job["status"]["artifacts"]["uri"].removeprefix("s3://").rstrip("/").partition("/")
    print(f"\nBucket s3://{bucket}/{prefix}\n" + show.bucket_listing(client, bucket, prefix))
    manifest = show.read_json(client, bucket, f"{prefix}/manifest.json")
    metrics = manifest["metrics"]
    fall = 1 - metrics["perplexity"] / metrics["perplexityBase"]
    print(
        f"\nHeld-out loss on answer tokens: base {metrics['heldOutLossBase']:.3f}, tuned {metrics['heldOutLoss']:.3f} "
        f"(perplexity {metrics['perplexityBase']:.2f} → {metrics['perplexity']:.2f}, {fall:.0%} lower)"
    )
    print(
        "\nAnswers to held-out prompts\n"
        + show.answers_text(show.read_json(client, bucket, f"{prefix}/reports/answers.json"))
    )


@app.command()
def env() -> None:
    """Print shell exports: where cluster, bucket, model and data are."""
    target = current_target()
    key, secret = store.credentials(target)
    values = {
        "KUBECONFIG": str(target.kubeconfig or context_kubeconfig(target)),
        "NAMESPACE": NAMESPACE,
        "AWS_ENDPOINT_URL": store.node_endpoint(target) if target.cluster_name else f"http://localhost:{store.PORT}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": store.REGION,
        "OUTPUT_URI": "s3://results/playground",
        "MODEL_URI": f"s3://models/{install.MODEL}",
        "DATASET_URI": f"s3://datasets/{install.DATASET}/train.jsonl",
    }
    for name, value in values.items():
        print(f"export {name}={value}")
    if target.kubeconfig is not None:
        print(f"export PATH={Path(target.kubectl_path).parent}:{Path(target.helm_path).parent}:$PATH")
    else:
        print(
            f"# The store from here: kubectl port-forward -n {NAMESPACE} service/{store.SERVICE} {store.PORT}:{store.PORT}"
        )


def context_kubeconfig(target: Target) -> Path:
    """A kubeconfig with the one context that CONTEXT names, so that plain kubectl speaks to the same cluster as the demo."""
    file = cache_root() / "demo" / "kubeconfig"
    write_atomically(file, target.kubectl("config", "view", "--minify", "--flatten"), mode=0o600)
    return file


@app.command("build")
def build() -> None:
    """Build what demo and tests run, as far as it is missing: programs, images and the base model. Starts nothing."""
    steps = Steps()
    steps("programs of the cluster", images.programs)
    if existing_target() is None:
        steps("images", images.build_all)
    steps("base model (SmolLM2-135M-Instruct)", install.model_folder)


@app.command("images")
def build_images() -> None:
    """Build the images and load or push them."""
    print(images.ensure(current_target()))


@app.command()
def down() -> None:
    """Remove the local cluster; on an existing one what the demo installed."""
    target = existing_target()
    if target is None:
        command = [sys.executable, "-m", "finetune_cluster", "down"]
        raise typer.Exit(subprocess.run(command, cwd=ROOT, check=False).returncode)
    target.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")
    target.helm("uninstall", RELEASE, "--namespace", SYSTEM_NAMESPACE, "--ignore-not-found")
    target.kubectl("delete", "namespace", SYSTEM_NAMESPACE, "--ignore-not-found")
    if install.crd_owner(target) == (SYSTEM_NAMESPACE, RELEASE):
        # A demo of an earlier version has not installed all of them.
        for crd in (c for c in CRDS if target.exists("crd", c)):
            left = target.kubectl("get", crd, "--all-namespaces", "--output", "name").split()
            if left:
                print(f"The CRD {crd} stays: {len(left)} objects outside {NAMESPACE} would go with it.")
            else:
                target.kubectl("delete", "crd", crd)


def main() -> None:
    """Run, and show foreseen errors without a traceback."""
    try:
        app()
    except (DemoError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
