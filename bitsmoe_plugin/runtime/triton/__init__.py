"""The runtime on a GPU: packed tensors and tokens in, outputs by Triton kernels out."""
