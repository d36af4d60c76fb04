"""Other quantizers, run on the same model and text for comparison."""

METHODS = ("full", "rtn", "gptq", "autoround", "gptq-all", "autoround-all", "bitsmoe", "checkpoint")
"""Names that ``bitsmoe compare --methods`` takes; ``runners.RUNNERS`` says what each does."""
