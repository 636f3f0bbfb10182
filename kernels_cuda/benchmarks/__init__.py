"""Speed of the kernels beside other implementations, in one run with the machine's own ceilings."""
