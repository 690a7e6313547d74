"""ovq: long-context pretraining with online vector-quantised attention (arXiv 2602.03922)."""
