"""What makes the method quick and is not part of it: kernels, compilation, memory, threads."""
