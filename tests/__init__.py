"""The tests. oneDNN may not use AMX, where trainer.precision=auto picks bf16, so all machines compute the same."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # before torch is imported
