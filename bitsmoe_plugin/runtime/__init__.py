"""Packed tensors and tokens in; outputs of the experts out."""
