"""ovq: long-context pretraining with online vector-quantised attention (arXiv 2602.03922)."""

from ovq.cpu import quiet_threads

quiet_threads()  # before anything imports torch
