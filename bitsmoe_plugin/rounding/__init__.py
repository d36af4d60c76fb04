"""Factors and their widths in; rounded and packed rows of a layer out."""
