"""Early detection of the loss of a Ray cluster."""

from __future__ import annotations

import socket
import time

from seqkd.errors import ClusterLost

INTERVAL_S = 1.0
"""Time between two checks."""
OWN_S, JOINED_S = 5.0, 50.0
"""Time without an answer after which a cluster is lost: one that this run started, and one that it
joined, whose control process may be restarted by its operator. Ray itself ends the driver after 60
seconds, without raising an error."""


class GcsWatch:
    """Check that Ray's control process (GCS) accepts connections. It is called by all code that
    waits. Raises ClusterLost."""

    def __init__(self, address: str, limit_s: float) -> None:
        host, _, port = address.rpartition(":")
        self.place, self.limit_s = (host, int(port)), limit_s
        self.answered = self.asked = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.asked < INTERVAL_S:
            return
        self.asked = now
        try:
            socket.create_connection(self.place, timeout=INTERVAL_S).close()
            self.answered = now
        except OSError as error:
            if now - self.answered > self.limit_s:
                raise ClusterLost(
                    f"cluster: Ray's control process (gcs_server) at {self.place[0]}:"
                    f"{self.place[1]} has not answered for {now - self.answered:.0f} s ({error}). "
                    "Start the cluster again if the run joined it. Then continue (seqkd train: "
                    "with --resume)."
                ) from None
