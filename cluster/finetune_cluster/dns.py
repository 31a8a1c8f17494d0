"""Asking a DNS server for an address, to see that it answers."""

import secrets
import socket
import struct
import time

from finetune_cluster.console import ClusterError


def resolves(server: str, name: str, seconds: float = 1) -> bool:
    """Whether ``server`` has an IPv4 address for ``name``."""
    identity = secrets.randbelow(1 << 16)
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.rstrip(".").split("."))
    query = struct.pack("!6H", identity, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(seconds)
        try:
            client.connect((server, 53))
            client.send(query)
            answer = client.recv(512)
        except OSError:
            return False
    got, flags, _, answers = struct.unpack("!4H", answer[:8])
    return bool(got == identity and flags & 0xF == 0 and answers > 0)


def wait_resolves(server: str, name: str, seconds: float = 60) -> None:
    """Wait until ``server`` has an address for ``name``."""
    end = time.monotonic() + seconds
    while not resolves(server, name):
        if time.monotonic() > end:
            raise ClusterError(
                f"DNS at {server} had no answer for {name} within {seconds:.0f} s; see coredns.log of that node."
            )
        time.sleep(0.1)
