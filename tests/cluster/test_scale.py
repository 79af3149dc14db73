"""The scaling simulation: its policy equals Serve's, its two models agree, and no row is lost."""

from __future__ import annotations

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from ray.serve.autoscaling_policy import _apply_default_params
from ray.serve.config import AutoscalingConfig

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reft_benchmark_scale", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module in sys.modules.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("down_factor", [1.0, 0.1])
def test_the_policy_equals_that_of_the_installed_serve(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch, down_factor: float
) -> None:
    config = AutoscalingConfig(
        min_replicas=1, max_replicas=50, target_ongoing_requests=8, upscale_delay_s=5, downscale_delay_s=30,
        downscaling_factor=down_factor,
    )  # fmt: skip
    rule = scale.Rule(target=8, highest=50, up_delay=5, down_delay=30, down_factor=down_factor, look_back=1)
    source = random.Random(3)
    clock = SimpleNamespace(time=lambda: float(now))
    monkeypatch.setattr("ray.serve.autoscaling_policy.time", clock)
    ours = theirs = running = 4
    state: dict = {}
    changes = 0
    load = 30.0
    for now in range(2_000):
        if now % 40 == 0:
            load = source.uniform(0, 600)
        context = SimpleNamespace(config=config, current_num_replicas=running, target_num_replicas=theirs)
        before = ours
        ours = rule.decide(now, load, running, ours)
        # Serve applies the bounds before the delays.
        raw = load / 8
        theirs, state = _apply_default_params(raw, context, state)
        theirs = min(50, max(1, theirs))
        if raw <= 50:
            assert ours == theirs, now
        theirs = ours
        changes += ours != before
        running = ours
    assert changes > 20


def test_both_models_predict_the_same_wait(scale: ModuleType) -> None:
    service = scale.Service(call=0.02, row=0.002)
    for rows in (100.0, 150.0):
        seen = scale.burst(service, rows, 1, scale.Rule(), seconds=60.0, factor=1.0, scaling=False)
        per_replica = rows / seen["replicas_before"]
        assert seen["shed_share"] == 0
        # The formula assumes batches of mean length; at low load, idle replicas answer sooner.
        assert 0.6 * service.wait(per_replica) < seen["steady_mean"] < 1.2 * service.wait(per_replica)


def test_a_day_without_bounds_sheds_nothing_and_counts_its_hours(scale: ModuleType) -> None:
    service = scale.Service(call=0.01, row=0.001, cold_start=30.0)
    found = scale.day(service, lambda now: 500.0, 4, scale.Rule(target=4, down_factor=0.1))
    assert found["rows"] == pytest.approx(500.0 * 86_400)
    assert found["day_shed_share"] == 0
    assert found["replica_hours"] == pytest.approx(found["replicas_mean"] * 24)
    assert 1 <= found["replicas_mean"] <= 3


def test_the_policy_oscillates_without_a_small_downscaling_factor(scale: ModuleType) -> None:
    """Batching makes ongoing calls grow more slowly than load, so the policy removes too many replicas at once."""
    service = scale.Service(call=0.01, row=0.001)
    rate = scale.diurnal(5_000)
    plain = scale.day(service, rate, 4, scale.Rule(target=8, highest=40))
    damped = scale.day(service, rate, 4, scale.Rule(target=4, down_factor=0.1, highest=40))
    assert plain["day_shed_share"] > 0.05
    assert damped["day_shed_share"] < 0.001
    assert damped["replica_hours"] < plain["replica_hours"]


@pytest.mark.parametrize("name", ["autoscaling", "service"])
@pytest.mark.parametrize(("call", "row", "rows"), [(0.01, 0.001, 4), (0.01, 0.0027, 4), (0.01, 0.0027, 32)])
def test_what_is_shipped_is_what_the_simulation_advises(
    scale: ModuleType, name: str, call: float, row: float, rows: int
) -> None:
    """A day at 80 % of the load that the largest number of replicas is sized for."""
    config = yaml.safe_load((ROOT / "serve_configs" / f"{name}.yaml").read_text())
    (teacher,) = (d for d in config["applications"][0]["deployments"] if d["name"] == "Teacher")
    shipped = teacher["autoscaling_config"]
    rule = scale.Rule(
        target=shipped["target_ongoing_requests"],
        lowest=shipped["min_replicas"],
        highest=shipped["max_replicas"],
        up_delay=shipped["upscale_delay_s"],
        down_delay=shipped["downscale_delay_s"],
        down_factor=shipped["downscaling_factor"],
    )
    service = scale.Service(call=call, row=row, max_ongoing=teacher["max_ongoing_requests"])
    load = scale.diurnal(0.8 * 0.6 * service.limit(rows) * min(10, shipped["max_replicas"] / 2))
    shed = scale.day(service, load, rows, rule)["day_shed_share"]
    assert shed < 0.005
    assert shed <= scale.day(service, load, rows, replace(rule, target=8, down_factor=1.0))["day_shed_share"]


def test_a_screening_scales_with_actors_and_repeats_lost_units(scale: ModuleType) -> None:
    service = scale.Service(call=0.01, row=0.001, cold_start=60.0)
    alone = scale.screening(service, 10_000_000, 1, 0.0)
    data = scale.Data()
    besides = data.plan(10_000_000, 1) + 10_000_000 * data.actor_row + data.close(10_000_000)
    assert alone["hours"] * 3600 == pytest.approx(10_000_000 / service.capacity + 60 + besides, rel=1e-6)
    ten = scale.screening(service, 10_000_000, 10, 0.0)
    assert alone["hours"] / 10 < ten["hours"] < alone["hours"] / 9
    unlucky = scale.screening(service, 10_000_000, 10, 20.0)
    assert unlucky["redone"] > 0
    assert unlucky["units"] == ten["units"]
    assert unlucky["hours"] > ten["hours"]
    # A terabyte on a thousand actors: neither planning nor closing is what it waits for.
    assert scale.screening(service, 10**9, 1000, 0.0)["plan_and_close_share"] < 0.15


def test_the_same_seed_gives_the_same_figures(scale: ModuleType) -> None:
    service = scale.Service(call=0.02, row=0.002)
    first, second = (scale.burst(service, 500.0, 2, scale.Rule(), seconds=90.0) for _ in range(2))
    assert first == second
    assert first["surge_p99"] > first["steady_p50"]
