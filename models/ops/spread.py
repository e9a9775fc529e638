"""What the models know of several devices: the name of the axis that rows are spread over."""

from __future__ import annotations

AXIS = "data"
"""Of the mesh. Each device has its part of a batch's rows, and of what else is spread over the same axis."""
