"""Telemetry: the metric catalogue, recorders, logs, traces, dashboards and alerts."""
