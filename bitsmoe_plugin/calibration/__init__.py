"""Text in; what each MoE layer is given for it, and the second moments of that, out."""
