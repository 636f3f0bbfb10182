"""Jobs for clusters: Slurm, Kubernetes JobSet, Ray. Each starts `mindjax` once per node."""
