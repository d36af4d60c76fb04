"""Benchmarks: ``bitsmoe bench NAME``. Each module named like one measures it, ``parsers`` has their options.

It has a function ``measure`` from the parsed options to a list of rows (flat dicts), one per line of its
table. Everything is measured side by side in one run.
"""
