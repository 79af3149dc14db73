"""A simulation: how many teacher replicas a load needs, their cost, and how long a call waits.

    python benchmarks/scale.py --calibrate [--json FILE]          # measures the service times of a random teacher
    python benchmarks/scale.py --call-ms 12 --row-ms 0.8 --peak-rows 5000 [--price 2.5]

A replica takes all waiting calls as one batch of `call` + rows x `row` seconds, as serving/batcher.py does.
Two models use it, both under Serve's autoscaling rule (a test compares that rule with the installed Ray):

- a day of diurnal load with bursts, as a fluid in steps of a second, for any number of replicas;
- a load that suddenly triples, as discrete events, call by call. Beyond 24 replicas a slice of 24 is simulated with
  its share of the load: routing by two choices does not depend on the number of replicas.

A screening of `--rows` is planned by tasks, its units are read, scored, lost with their machine and scored again, and the
driver closes it; the processor times of all that are measured ones. Networks, gateways and accelerators are not measured.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import json
import math
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

DAY = 86_400
SLICE = 24
UNIT_ROWS = 2_000


@dataclass(frozen=True)
class Service:
    """Service times in seconds; `batch_rows` is the largest batch of a teacher."""

    call: float
    row: float
    batch_rows: int = 512
    max_ongoing: int = 32
    cold_start: float = 120.0

    @property
    def capacity(self) -> float:
        """Rows per second of a replica with full batches."""
        return self.batch_rows / (self.call + self.row * self.batch_rows)

    def limit(self, rows_per_call: int) -> float:
        """The same for calls of one size: a batch has at most `max_ongoing` calls."""
        rows = min(self.batch_rows, self.max_ongoing * rows_per_call)
        return rows / (self.call + self.row * rows)

    def wait(self, rows_per_second: float) -> float:
        """Mean seconds of a call below capacity: half of the running batch and the whole next one.

        In equilibrium a batch holds the arrivals of the previous one: T = call + row x rate x T.
        """
        return 1.5 * self.call / (1 - self.row * rows_per_second)


@dataclass
class Rule:
    """Serve's default policy: ongoing calls against a target, bounded, delayed both ways. Times in seconds."""

    target: float = 8.0
    lowest: int = 1
    highest: int = 1_000
    up_delay: float = 5.0
    down_delay: float = 300.0
    up_factor: float = 1.0
    down_factor: float = 1.0
    look_back: int = 30
    _seen: deque[float] = field(default_factory=deque, init=False)
    _since: float | None = field(default=None, init=False)
    _direction: int = field(default=0, init=False)

    def decide(self, now: float, ongoing: float, running: int, wanted: int) -> int:
        """The number of replicas that Serve wants after this observation."""
        self._seen.append(ongoing)
        if len(self._seen) > self.look_back:
            self._seen.popleft()
        mean = sum(self._seen) / len(self._seen)
        raw = mean / self.target
        factor = self.up_factor if raw > running else self.down_factor
        desired = math.ceil(running + factor * (raw - running))
        if math.ceil(raw) < running == desired:
            desired -= 1
        desired = min(self.highest, max(self.lowest, desired))
        direction = (desired > wanted) - (desired < wanted)
        if direction == 0 or direction != self._direction:
            self._since, self._direction = (now if direction else None), direction
        if direction and self._since is not None:
            delay = self.up_delay if direction > 0 else self.down_delay
            if now - self._since >= delay - 1e-6:
                self._since, self._direction = None, 0
                return desired
        return wanted


class Fleet:
    """Wanted, starting and ready replicas."""

    def __init__(self, ready: int, cold_start: float) -> None:
        self.ready = self.wanted = ready
        self._starting: deque[float] = deque()
        self._cold_start = cold_start

    @property
    def paid(self) -> int:
        """Replicas that cost money, starting ones included."""
        return self.ready + len(self._starting)

    def move(self, now: float, wanted: int) -> None:
        """Start or stop replicas; starting ones are stopped first."""
        while self._starting and self._starting[0] <= now:
            self._starting.popleft()
            self.ready += 1
        self._starting.extend([now + self._cold_start] * max(0, wanted - self.paid))
        while self.paid > wanted and self._starting:
            self._starting.pop()
        self.ready = min(self.ready, wanted)
        self.wanted = wanted


def diurnal(peak: float, seed: int = 0) -> Callable[[float], float]:
    """Rows per second over a day: a fifth of the peak at night, and 24 bursts of five minutes that add a half."""
    source = random.Random(seed)
    bursts = sorted(source.uniform(0, DAY) for _ in range(24))

    def rate(now: float) -> float:
        wave = peak * (0.6 - 0.4 * math.cos(2 * math.pi * now / DAY))
        begun = bisect.bisect(bursts, now)
        return wave * (1.5 if begun and now < bursts[begun - 1] + 300 else 1.0)

    return rate


def day(service: Service, rate: Callable[[float], float], rows_per_call: int, rule: Rule) -> dict[str, float]:
    """Replica hours, waiting and shed rows of a day."""
    limit = service.limit(rows_per_call)
    fleet = Fleet(max(rule.lowest, math.ceil(rate(0) / limit / 0.6)), service.cold_start)
    backlog = shed = total = paid = 0.0
    peak = 0
    waits: list[tuple[float, float]] = []
    for now in range(DAY):
        rows = rate(now)
        able = fleet.ready * limit
        queue_limit = fleet.ready * service.max_ongoing * rows_per_call
        backlog = max(0.0, backlog + rows - able)
        lost = max(0.0, backlog - queue_limit)
        backlog -= lost
        load = min(0.98 * limit, rows / fleet.ready)
        waiting = service.wait(load)
        waits.append((waiting + backlog / able, rows))
        ongoing = (min(rows, able) * waiting + backlog) / rows_per_call
        fleet.move(now, rule.decide(now, ongoing, fleet.ready, fleet.wanted))
        paid += fleet.paid
        peak = max(peak, fleet.paid)
        shed += lost
        total += rows
    return {
        "rows": total,
        "replicas_mean": paid / DAY,
        "replicas_peak": peak,
        "replica_hours": paid / 3600,
        "day_shed_share": shed / total,
        "p99_of_mean_waits": _weighted(waits, 0.99),
    }


def burst(
    service: Service,
    rows_per_second: float,
    rows_per_call: int,
    rule: Rule,
    seconds: float = 240.0,
    factor: float = 3.0,
    seed: int = 0,
    scaling: bool = True,
) -> dict[str, float]:
    """Calls as discrete events: a minute of steady load, then `factor` times as much until the end."""
    source = random.Random(seed)
    start = max(1, round(rows_per_second / service.limit(rows_per_call) / 0.6))
    share = min(1.0, SLICE / start)
    fleet = Fleet(max(1, round(start * share)), service.cold_start)
    bounded = replace(rule, lowest=1, highest=max(1, int(rule.highest * share)))
    base = rows_per_second * share / rows_per_call
    queues: list[deque[float]] = [deque() for _ in range(fleet.ready)]
    # Calls of the running batch; 0 for an idle replica.
    running = [0] * fleet.ready
    steady: list[float] = []
    surge: list[float] = []
    offered = shed = 0
    events: list[tuple[float, int, int, tuple[float, ...]]] = [(source.expovariate(base), 0, 0, ()), (1.0, 1, 0, ())]
    per_batch = max(1, service.batch_rows // rows_per_call)

    def begin(now: float, replica: int) -> None:
        batch = tuple(queues[replica].popleft() for _ in range(min(per_batch, len(queues[replica]))))
        running[replica] = len(batch)
        if batch:
            done = now + service.call + service.row * rows_per_call * len(batch)
            heapq.heappush(events, (done, 2, replica, batch))

    while events:
        now, kind, replica, batch = heapq.heappop(events)
        if now > seconds:
            break
        if kind == 0:
            offered += 1
            pair = source.sample(range(fleet.ready), 2) if fleet.ready > 1 else [0, 0]
            best = min(pair, key=lambda r: len(queues[r]) + running[r])
            if len(queues[best]) + running[best] >= service.max_ongoing:
                shed += 1
            else:
                queues[best].append(now)
                if not running[best]:
                    begin(now, best)
            speed = base * (factor if now >= 60 else 1.0)
            heapq.heappush(events, (now + source.expovariate(speed), 0, 0, ()))
        elif kind == 1:
            ongoing = sum(map(len, queues)) + sum(running)
            wanted = bounded.decide(now, ongoing, fleet.ready, fleet.wanted) if scaling else fleet.wanted
            # No replica is stopped during a surge.
            fleet.move(now, max(wanted, fleet.ready))
            queues.extend(deque() for _ in range(fleet.ready - len(queues)))
            running.extend([0] * (fleet.ready - len(running)))
            heapq.heappush(events, (now + 1.0, 1, 0, ()))
        else:
            (steady if now < 60 else surge).extend(now - began for began in batch)
            begin(now, replica)
    return {
        "replicas_before": start,
        "replicas_after": round(fleet.ready / share),
        "steady_mean": statistics.fmean(steady),
        "steady_p50": _quantile(steady, 0.5),
        "steady_p99": _quantile(steady, 0.99),
        "surge_p99": _quantile(surge or steady, 0.99),
        "shed_share": shed / offered,
    }


@dataclass(frozen=True)
class Data:
    """What a row costs besides the model, in processor seconds as `screening_stages.py` measures them.

    Tasks plan, as many at a time as there are actors; an actor reads, judges and writes; the driver closes, unit by unit.
    """

    row_bytes: int = 1_000
    plan_byte: float = 1 / 700e6
    actor_row: float = 575e-6
    close_unit: float = 0.4e-3

    def plan(self, rows: int, actors: int) -> float:
        """Seconds until the first unit is known."""
        return rows * self.row_bytes * self.plan_byte / actors

    def close(self, rows: int) -> float:
        """Seconds after the last unit."""
        return -(-rows // UNIT_ROWS) * self.close_unit


def screening(
    service: Service, rows: int, actors: int, losses_per_hour: float, data: Data = Data(), seed: int = 0
) -> dict[str, float]:
    """A dataset in units on actors that are lost `losses_per_hour` times each; a lost unit is scored again."""
    source = random.Random(seed)
    # Limits the number of simulated units; larger ones make the tail longer and losses more expensive.
    unit_rows = max(UNIT_ROWS, rows // 200_000)
    left = units = -(-rows // unit_rows)
    seconds = unit_rows * (1 / service.capacity + data.actor_row)
    free = [data.plan(rows, actors) + service.cold_start] * actors
    heapq.heapify(free)
    lost = 0
    hazard = losses_per_hour / 3600
    while left:
        now = heapq.heappop(free)
        death = source.expovariate(hazard) if hazard else math.inf
        if death < seconds:
            lost += 1
            heapq.heappush(free, now + death + service.cold_start)
        else:
            left -= 1
            heapq.heappush(free, now + seconds)
    # Actors are given back before the driver closes.
    device, end = actors * max(free), max(free) + data.close(rows)
    alone = (data.plan(rows, actors) + data.close(rows)) / end
    return {
        "actors": actors,
        "hours": end / 3600,
        "device_hours": device / 3600,
        "units": units,
        "redone": lost,
        "plan_and_close_share": alone,
    }


def calibrate() -> Service:
    """Service times of a random teacher on this machine: a line through the medians of three batch sizes."""
    from random_teacher import prompts, save_random_teacher

    with tempfile.TemporaryDirectory() as folder:
        scorer = save_random_teacher(Path(folder), "small").scorer()
        points = []
        for rows in (1, 8, 64):
            timings = []
            for repeat in range(7):
                texts = prompts(rows, seed=1000 * rows + repeat)
                started = time.perf_counter()
                scorer.score(texts)
                timings.append(time.perf_counter() - started)
            points.append((rows, statistics.median(timings)))
    line = statistics.linear_regression([r for r, _ in points], [s for _, s in points])
    # A fit through noise can cross zero.
    return Service(max(line.intercept, 1e-4), line.slope)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _weighted(values: list[tuple[float, float]], share: float) -> float:
    values = sorted(values)
    bound = share * sum(weight for _, weight in values)
    for value, weight in values:
        bound -= weight
        if bound <= 0:
            return value
    return values[-1][0]


def report(
    service: Service, peaks: Sequence[float], rows_per_call: int, price: float, rows: int, rule: Rule, data: Data
) -> dict[str, Any]:
    """All results for loads given in rows per second at the day's peak."""
    fleets = []
    for peak in peaks:
        highest = 4 * max(1, math.ceil(peak / service.limit(rows_per_call)))
        whole = day(service, diurnal(peak), rows_per_call, replace(rule, highest=highest))
        sudden = burst(service, peak, rows_per_call, replace(rule, highest=highest))
        fleets.append({"peak_rows_per_second": peak, "cost_per_day": whole["replica_hours"] * price, **whole, **sudden})
    runs = []
    for actors in (1, 10, 100, 1000):
        for losses in (0.0, 0.05):
            made = screening(service, rows, actors, losses, data)
            runs.append({**made, "losses_per_hour": losses, "cost": made["device_hours"] * price})
    return {
        "service": asdict(service),
        "price": price,
        "rows_per_call": rows_per_call,
        "fleets": fleets,
        "screening": runs,
    }


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--calibrate", action="store_true", help="measure service times of a random teacher on this machine"
    )
    parser.add_argument("--call-ms", type=float, default=10.0, help="fixed time of a batch")
    parser.add_argument("--row-ms", type=float, default=1.0, help="time of a row in a batch")
    parser.add_argument("--rows-per-call", type=int, default=4)
    parser.add_argument(
        "--peak-rows", type=float, nargs="*", help="rows per second; by default for 1 to 1,000 replicas"
    )
    parser.add_argument("--target", type=float, default=Rule.target, help="target_ongoing_requests")
    parser.add_argument("--down-factor", type=float, default=Rule.down_factor, help="downscaling_factor")
    parser.add_argument("--cold-start", type=float, default=Service.cold_start, help="seconds to a ready replica")
    parser.add_argument("--price", type=float, default=1.0, help="of a replica for an hour, in any currency")
    parser.add_argument("--rows", type=int, default=10**9, help="rows of the screening")
    parser.add_argument("--row-bytes", type=int, default=Data.row_bytes, help="of a row of the screening")
    parser.add_argument("--no-fleets", action="store_true", help="the screening alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    service = calibrate() if options.calibrate else Service(options.call_ms / 1e3, options.row_ms / 1e3)
    service = replace(service, cold_start=options.cold_start)
    rule = Rule(target=options.target, down_factor=options.down_factor)
    unit = 0.6 * service.limit(options.rows_per_call)
    peaks = options.peak_rows or [unit * count for count in (1, 10, 100, 1000)]
    data = Data(options.row_bytes)
    made = report(
        service, [] if options.no_fleets else peaks, options.rows_per_call, options.price, options.rows, rule, data
    )
    print(f"a batch lasts {service.call * 1e3:.2f} ms + {service.row * 1e3:.3f} ms per row; "
          f"at most {service.capacity:,.0f} rows/s")  # fmt: skip
    print(f"{'peak rows/s':>12} {'mean':>7} {'peak':>6} {'cost/day':>9} {'shed':>7} | "
          f"{'p50 ms':>7} {'p99 ms':>7} {'x3 p99':>7} {'x3 shed':>7}")  # fmt: skip
    for item in made["fleets"]:
        print(f"{item['peak_rows_per_second']:12,.0f} {item['replicas_mean']:7.1f} {item['replicas_peak']:6.0f} "
              f"{item['cost_per_day']:9,.0f} {item['day_shed_share']:7.2%} | {item['steady_p50'] * 1e3:7.0f} "
              f"{item['steady_p99'] * 1e3:7.0f} {item['surge_p99'] * 1e3:7.0f} {item['shed_share']:7.2%}")  # fmt: skip
    print(f"\nscreening {options.rows:,} rows of {data.row_bytes:,} bytes\n{'actors':>7} {'losses/h':>9} {'hours':>9} "
          f"{'device h':>9} {'cost':>9} {'plan, close':>12}")  # fmt: skip
    for run in made["screening"]:
        print(f"{run['actors']:7} {run['losses_per_hour']:9.2f} {run['hours']:9.1f} {run['device_hours']:9,.0f} "
              f"{run['cost']:9,.0f} {run['plan_and_close_share']:12.1%}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(made, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
