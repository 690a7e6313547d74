"""The parts of `eval.bench_gpu`: what is checked, who competes, how time is taken, and what is made of it."""
