"""Benchmarks: speed, memory and cost of operators, models, kernels and the data pipeline."""
