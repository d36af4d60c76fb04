"""What options and their help say of the format; needs no tensors, so that help comes at once."""

FORMAT_VERSION = 2
FACTORS = ("gate", "up", "down")
"""Of experts that have a gate; others lack the first."""
GRIDS = ("trellis", "uniform")
TILED = "tiled"
"""Grid of converted checkpoints (``codec.tiled``), which nothing is quantized to."""
