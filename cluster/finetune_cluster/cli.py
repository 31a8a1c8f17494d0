"""Command line of the driver."""

import json
import os
import re
import signal
import sys
from typing import Annotated

import typer

from finetune_cluster.binaries import ensure_binaries, ensure_helm
from finetune_cluster.console import ClusterError, say
from finetune_cluster.instance import require

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Name = Annotated[
    str, typer.Option("--name", envvar="CLUSTER_NAME", help="Which cluster; several can run side by side.")
]
DEFAULT = "finetune"


@app.command()
def up(
    name: Name = DEFAULT,
    nodes: Annotated[int, typer.Option(help="How many nodes at least.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="Pretended nvidia.com/gpu a node. Default: as it is, at first 2.")
    ] = None,
    gpu_product: Annotated[str, typer.Option(help="Label nvidia.com/gpu.product of nodes with GPUs.")] = "Pretend",
    memory_per_node: Annotated[
        str | None, typer.Option(help="What pods may request on a node, for example 8Gi. Default: all.")
    ] = None,
) -> None:
    """Bring the cluster up, repair it, or add nodes to it. Calling it again does no harm."""
    from finetune_cluster.up import up as bring_up

    instance = bring_up(name, nodes, gpus_per_node, _mebibytes(memory_per_node), gpu_product)
    say(f"export KUBECONFIG={instance.kubeconfig}")


@app.command()
def down(name: Name = DEFAULT) -> None:
    """Delete the cluster and everything in it."""
    from finetune_cluster.down import down as take_down

    take_down(name)


@app.command()
def status(
    name: Name = DEFAULT, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False
) -> None:
    """Show components, nodes, addresses and images. Exit code 1 if something is wrong."""
    from finetune_cluster.status import cluster_status, show

    result = cluster_status(require(name))
    if as_json:
        print(json.dumps(result.as_dict(), indent=1))
    else:
        show(result)
    raise typer.Exit(0 if result.healthy else 1)


@app.command()
def env(name: Name = DEFAULT) -> None:
    """Print exports for a shell: KUBECONFIG, and a PATH with kubectl."""
    instance = require(name)
    print(f"export KUBECONFIG={instance.kubeconfig}")
    print(
        f"export PATH={ensure_binaries().folder}:{ensure_helm().parent if helm_is_built() else ''}:$PATH".replace(
            "::", ":"
        )
    )
    print(f"export CLUSTER_NODE_ADDRESS={instance.api_address}")
    print(f"export CLUSTER_HOST_ADDRESS={instance.gateway}")


@app.command()
def build(
    target: Annotated[str, typer.Argument(help="Target of the Dockerfile.")],
    tag: Annotated[str, typer.Option(help="Name of the image.")],
) -> None:
    """Build an image from the checkout's Dockerfile into the driver's own store."""
    from finetune_cluster.images import build as build_image

    print(build_image(target, tag, show=True))


@app.command()
def load(
    images: Annotated[list[str], typer.Argument(help="Tags of the driver's store, or archives (.tar).")],
    name: Name = DEFAULT,
) -> None:
    """Load images into every node; only layers that it does not have are moved."""
    from finetune_cluster.images import load as load_images

    load_images(require(name), images)


@app.command()
def images() -> None:
    """List the images of the driver's store."""
    from finetune_cluster.images import tags

    print("\n".join(tags()))


@app.command()
def prune() -> None:
    """Delete the store of built images. Nodes keep what was loaded; the next build starts anew."""
    from finetune_cluster.buildstore import delete_store

    delete_store()


@app.command()
def binaries() -> None:
    """Build the cluster's programs and helm, and print their folders."""
    print(ensure_binaries().folder)
    print(ensure_helm().parent)


@app.command()
def kill_node(
    node: str,
    name: Name = DEFAULT,
    kubelet: Annotated[bool, typer.Option("--kubelet", help="Only silence the kubelet; its pods run on.")] = False,
) -> None:
    """Lose a node at once, as by a power failure."""
    from finetune_cluster.node import stop
    from finetune_cluster.processes import node_inits, programs

    instance = require(name)
    wanted = instance.node(node)
    if kubelet:
        for process in programs(node_inits(instance).get(node, 0)):
            if process.program == "kubelet":
                os.kill(process.pid, signal.SIGSTOP)
    else:
        stop(instance, wanted)


@app.command()
def start_node(node: str, name: Name = DEFAULT) -> None:
    """Start a node that was lost."""
    from finetune_cluster.processes import node_inits, programs
    from finetune_cluster.up import ensure_running

    instance = require(name)
    ensure_running(instance, instance.node(node))
    for process in programs(node_inits(instance)[node]):
        if process.program == "kubelet":
            os.kill(process.pid, signal.SIGCONT)


def helm_is_built() -> bool:
    """Whether ``env`` can name helm without building it first."""
    from finetune_cluster.binaries import HELM_VERSION
    from finetune_cluster.paths import cache_root

    return (cache_root() / "bin" / f"helm-{HELM_VERSION}" / "helm").exists()


def _mebibytes(quantity: str | None) -> int | None:
    if quantity is None:
        return None
    match = re.fullmatch(r"(\d+)(Mi|Gi)", quantity)
    if not match:
        raise ClusterError(f"{quantity!r} does not do as an amount of memory: write 512Mi or 8Gi.")
    return int(match[1]) * (1024 if match[2] == "Gi" else 1)


def main() -> None:
    """Run, and show errors that we foresaw without a traceback."""
    try:
        app()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
