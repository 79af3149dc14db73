"""Ray Serve: teacher and student replicas, gateway and the application builder."""

import os

LOW_LATENCY = {
    # gRPC instead of actor tasks between proxy, gateway and teacher: a third less time per request.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # One event loop per replica instead of three: our code never blocks it.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""Environment variables that lower Serve's latency; `cluster/templates` sets the same for pods."""

# Here, because Serve reads them when it is imported, and the options of an application's handles with them.
for _name, _value in LOW_LATENCY.items():
    os.environ.setdefault(_name, _value)
