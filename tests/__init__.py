"""The tests. oneDNN is kept from AMX, with which trainer.precision=auto is bf16: all machines then compute alike."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # before torch is imported
