"""A model, or its files, in; the weights, biases and gating of its experts out."""
