"""Rows are coded, packed and split in blocks of 32 values."""

BLOCK = 32
