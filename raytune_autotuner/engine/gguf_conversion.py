"""Turns a GGUF file into a folder of safetensors. Runs in the engine's own Python, which has transformers.

Arguments: the GGUF file and the folder to write. The weights are dequantised to bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(gguf: Path, folder: Path) -> None:
    """Read `gguf`, write `folder`: config, tokenizer and weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    dequantize = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=dequantize
    ).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
