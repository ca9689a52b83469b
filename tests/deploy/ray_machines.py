"""python -P -m baton.tests.deploy.ray_machines: a Ray cluster of three pretended machines, until standard input ends.

It prints the address. Run by a Python that has Ray. A machine notices after 5 s that the head is gone, not after 60.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

HEAD_GONE_S = 5


def main() -> None:
    limits = {"gcs_rpc_server_reconnect_timeout_s": HEAD_GONE_S}
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": limits}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
