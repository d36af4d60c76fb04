"""Other quantizers, run on the same model and text for comparison."""
