"""The seams of other libraries: their calls in, calls of commands and runtime out."""
