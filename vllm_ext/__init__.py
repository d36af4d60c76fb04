"""The vLLM side of BitsMoE."""
