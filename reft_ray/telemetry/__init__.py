"""What we count: one catalogue of metrics, recorders, dashboards and alerts."""
