"""PostgreSQL and a host that is lost while it holds a lock: the others go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest
from cluster.namespaces import Net, network, postgres, wait_until

from reft_ray.jobs.database import Database

pytestmark = [pytest.mark.servers, pytest.mark.slow]

SECONDS = 60
HOLD = """
import sys, time
from reft_ray.jobs.database import Database
database = Database.open(sys.argv[1])
with database.write() as connection:
    database.serialize(connection, "slots")
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def net() -> Iterator[Net]:
    with network() as made:
        yield made


def test_a_lock_of_a_lost_host_is_released(net: Net) -> None:
    lost, store = range(2)
    net.add(lost)
    net.add(store)
    with postgres(net, store) as url:
        holder = net.start(lost, sys.executable, "-c", HOLD, url)
        wait_until(lambda: "held" in net.log(holder), 60, holder, net)
        net.cut(lost)
        cut = time.monotonic()
        database = Database.open(url)
        # Without it PostgreSQL, which knows nothing of the loss, would let this wait for two hours.
        with database.write() as connection:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{SECONDS}s'")
            database.serialize(connection, "slots")
        database.close()
        print(f"released {time.monotonic() - cut:.0f} s after the cut")
