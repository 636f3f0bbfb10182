"""CUDA C++ kernels, their build and their bindings."""
