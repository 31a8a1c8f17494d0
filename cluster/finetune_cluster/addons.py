"""What a new cluster gets besides its programs."""

from finetune_cluster.api import Api, Object

RBAC = "rbac.authorization.k8s.io"


def objects() -> list[tuple[str, Object]]:
    """Paths and objects to apply."""
    read = ["list", "watch"]
    role: Object = {
        "apiVersion": f"{RBAC}/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "system:coredns"},
        "rules": [
            {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": read},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read},
        ],
    }
    binding: Object = {
        "apiVersion": f"{RBAC}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "system:coredns"},
        "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": "system:coredns"},
        "subjects": [{"apiGroup": RBAC, "kind": "User", "name": "system:coredns"}],
    }
    root = f"/apis/{RBAC}/v1"
    return [(f"{root}/clusterroles/system:coredns", role), (f"{root}/clusterrolebindings/system:coredns", binding)]


def ensure_addons(api: Api) -> None:
    """Apply them all."""
    for path, body in objects():
        api.apply(path, body)
