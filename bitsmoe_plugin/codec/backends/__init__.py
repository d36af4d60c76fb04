"""The same codes by compiled C and by Triton kernels: rows in, codes or packed words out."""
