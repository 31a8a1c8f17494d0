"""What a cluster could leave behind on the host."""

import json
import os
import re
import subprocess
from pathlib import Path

from finetune_cluster.buildstore import images_root
from finetune_cluster.cgroups import ROOT
from finetune_cluster.instance import Instance

FOLDERS = ("/etc", "/run", "/run/netns", "/var/lib", "/var/log", "/var/lib/cni", "/etc/cni", "/opt")


def traces(name: str) -> dict[str, set[str]]:
    """Everything there is now, by kind, apart from the pods of other clusters than ``name`` and from builds, which come and go meanwhile."""
    others = re.compile(rf"/finetune-cluster-(?!{name}(/|$))|/process_api")
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {
        "mounts": {point for point in points if not point.startswith(str(images_root()))},
        "devices and addresses": set(_addresses()),
        "routes": set(_output("ip", "route", "show", "table", "all").splitlines()),
        "firewall rules": set(_output("nft", "list", "ruleset").splitlines()),
        "network namespaces": set(_output("ip", "netns", "list").splitlines()),
        "cgroups": {folder for folder, _, _ in os.walk(ROOT) if not others.search(folder)},
        "hosts entries": set(Path("/etc/hosts").read_text().splitlines()),
        "files": {str(entry) for folder in FOLDERS if Path(folder).is_dir() for entry in Path(folder).iterdir()},
    }


def processes_of(instance: Instance) -> set[str]:
    """Processes that belong to the cluster: by command line, by folder, or by cgroup."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            cgroup = (entry / "cgroup").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if f"{instance.state}/" in command or f"/{instance.cgroup_parent}/" in cgroup:
            found.add(f"{entry.name} {command}")
    return found


def _addresses() -> list[str]:
    links = json.loads(_output("ip", "-json", "address", "show"))
    return [
        f"{link['ifname']} {address.get('local', '')}"
        for link in links
        for address in (*link.get("addr_info", []), {})
        if link.get("ifname")
    ]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
