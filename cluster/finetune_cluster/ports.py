"""Free TCP ports on loopback for servers that are about to start."""

import random
import socket

LOOPBACK = "127.0.0.1"
# Below the ports that the kernel gives to outgoing connections: one of those could be taken between the look and the start,
# or while a server is being restarted on its port.
PORTS = range(20000, 30000)


def free_ports(count: int) -> list[int]:
    """``count`` different ports that nothing listens on now, in random order: several processes that ask at the same time
    hardly ever get the same.

    Raises RuntimeError when there are not so many.
    """
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(found) == count:
            return found
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
    raise RuntimeError(f"no {count} free ports between {PORTS.start} and {PORTS.stop - 1}")
