"""Packed tensors and what describes them in; files out; and back, every value checked."""
