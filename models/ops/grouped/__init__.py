"""Every token through the experts it chose: `matmul` is the door, `dot` the floor that a kernel replaces."""
