"""Write a tiny random byte-level teacher and student, for tests and configs/tiny.yaml."""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULT = Path("~/.cache/seqkd/models").expanduser()
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer():  # type: ignore[no-untyped-def]
    """Return a tokenizer of bytes and five special tokens, with 261 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocab = {piece: i for i, piece in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
    )
    fast.chat_template = TEMPLATE
    return fast


def write_tiny(
    directory: Path, layers: int, seed: int, vocab_size: int = 320, spread: float = 0.3
) -> Path:
    """Write a random Llama of hidden size 64. A larger ``spread`` sharpens its outputs."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=spread,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def main() -> None:
    """Write both models to --out, unless they exist."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT)
    args = parser.parse_args()
    for name, layers, seed in (("tiny-teacher", 4, 1), ("tiny-student", 2, 2)):
        if not (args.out / name / "model.safetensors").exists():
            write_tiny(args.out / name, layers, seed)
        print(args.out / name)


if __name__ == "__main__":
    main()
