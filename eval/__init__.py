import ovq  # noqa: F401  first, because it decides how OpenMP's threads wait, before torch is imported
