"""Ray Serve: teacher and student replicas, gateway and the application builder."""
