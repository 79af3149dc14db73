"""Building blocks for Ray Data: read rows in any format, moderate them, write each of them once; see docs/python.md."""

from reft_ray.data.arriving import arriving_rows
from reft_ray.data.moderate import Moderate
from reft_ray.data.read import ROWS, read_rows
from reft_ray.data.write import Written, write_rows

__all__ = ["ROWS", "Moderate", "Written", "arriving_rows", "read_rows", "write_rows"]
