"""A real API server with our CRDs, for tests."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT / "crds"


@dataclass(frozen=True)
class ApiServer:
    """How to reach it."""

    kubeconfig: Path
    kubectl_path: Path

    def kubectl(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl from the repository's root."""
        return subprocess.run(
            [str(self.kubectl_path), "--kubeconfig", str(self.kubeconfig), *arguments],
            input=stdin,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def install_crds(self) -> None:
        """Apply the CRDs and wait until they are served."""
        self.kubectl("apply", "--server-side", "-f", str(CRDS)).check_returncode()
        for path in sorted(CRDS.glob("*.yaml")):
            self._served(path.stem)

    def _served(self, resource: str) -> None:
        name = f"crd/{resource}"
        # `kubectl wait` (1.34) fails at once on a CRD that is so new that it has no conditions.
        self.kubectl("wait", "--for=jsonpath={.status.conditions}", name, "--timeout=30s").check_returncode()
        self.kubectl("wait", "--for=condition=Established", name, "--timeout=30s").check_returncode()
        # Established, and for a moment it answers 429 "storage is (re)initializing": nothing tells when that is over.
        end = time.monotonic() + 30
        while (listed := self.kubectl("get", resource, "--all-namespaces")).returncode:
            if time.monotonic() > end:
                listed.check_returncode()
