"""Rows of numbers in; codes, and the packed tensors that store them, out; and back."""
