"""Weights and statistics of a layer in; shared bases, and how errors in its factors count, out."""
