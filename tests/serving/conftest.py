"""Ray's own deprecations are not ours: it is imported once, before warnings become errors."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
