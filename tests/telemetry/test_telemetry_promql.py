"""PromQL expressions are correct, and invalid ones are refused."""

import pytest

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.promql import Query

Q = Query("5m", {"cluster": "$cluster", "teacher": "$teacher"})
N = c.FILTER_TRUNCATIONS.name


def test_selectors_have_only_labels_that_exist():
    assert Q.series(c.FILTER_TRUNCATIONS) == f'{N}{{cluster=~"$cluster"}}'
    assert 'teacher=~"$teacher"' in Q.series(c.FILTER_ROWS)
    assert 'teacher=~"t1"' in Q.series(c.FILTER_ROWS, teacher="t1")


def test_counters_are_summed_over_workers_and_replicas():
    assert Query("5m").rate(c.FILTER_TRUNCATIONS, "stream") == (f"sum by (stream) (rate({N}{{}}[5m]))")
    assert "WorkerId" not in Q.share(c.FILTER_ROWS, decision="block")


def test_a_ratio_is_zero_without_a_part_and_absent_without_a_whole():
    assert Query.ratio("bad", "all") == "(bad or 0 * all) / (all > 0)"


def test_gauges_of_the_job_store_are_counted_once_for_many_gateways():
    name = c.JOBS.name
    assert Query("5m").shared_gauge(c.JOBS, "project", "status") == (
        f"sum by (status) (max by (status, project) ({name}{{}}))"
    )


def test_above_matches_the_bounds_of_ray_and_prometheus_client():
    assert 'le=~"0[.]5"' in Q.rate_above(0.5, c.FILTER_REQUEST_SECONDS)
    assert 'le=~"600([.]0)?"' in Q.rate_above(600.0, c.SCREENING_SECONDS)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Q.series(c.FILTER_ROWS, colour="red"), "has no label"),
        (lambda: Q.rate(c.JOBS), "has no rate"),
        (lambda: Q.gauge(c.FILTER_ROWS), "is a counter, not a gauge"),
        (lambda: Q.quantile(0.5, c.FILTER_ROWS), "is a counter, not a histogram"),
        (lambda: Q.rate_above(0.51, c.FILTER_REQUEST_SECONDS), "no bucket bound"),
    ],
)
def test_invalid_queries_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
