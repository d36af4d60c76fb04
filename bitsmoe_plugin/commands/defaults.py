"""Values that commands and their help share; needs no library, so that help comes at once."""

BLOCK = 512
"""Tokens per block of text on which perplexity is measured, unless another number is asked for."""
TOKENS = 131_072
"""Of calibration, of commands that know no model before they read the text."""
PROMPT = 16
"""Tokens of others that a model goes on from where it writes text itself."""
WRITTEN = BLOCK - 1
"""Tokens of a sequence that a model writes: with the end-of-text behind each document it fills a block."""
WRITTEN_AT_ONCE = 32
"""Sequences; their keys and values are in memory."""
SHAPES = {
    "qwen3-30b-a3b": ((128, 2048, 768), 8),
    "deepseek-v2-lite": ((64, 2048, 1408), 6),
    "moe-tiny": ((48, 128, 64), 4),
}
"""Name of a model -> (experts, hidden size, intermediate size) of a layer, experts per token."""
