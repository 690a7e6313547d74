"""Registers the model with transformers: after `import ovq.hf`, its Auto classes open an exported folder.

    import ovq.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("exported"), AutoTokenizer.from_pretrained("exported")

No code from the folder is run, and on a GPU this package's kernels are used. Needs the extra `export`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from ovq.export import modeling
from ovq.export.code import write_code
from ovq.export.modeling import OVQCache, OVQConfig

__all__ = ["OVQCache", "OVQConfig", "OVQForCausalLM"]


class OVQForCausalLM(modeling.OVQForCausalLM):
    """The model; it is saved together with the code that opens it where this package is not installed."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        if is_main_process:
            assert isinstance(self.config, OVQConfig)
            write_code(self.config, Path(save_directory))
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)


AutoConfig.register(OVQConfig.model_type, OVQConfig, exist_ok=True)
AutoModelForCausalLM.register(OVQConfig, OVQForCausalLM, exist_ok=True)
