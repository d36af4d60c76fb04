"""The vLLM side of BitsMoE; nothing in it yet."""
