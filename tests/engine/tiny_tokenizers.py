"""Small tokenizers made in the test: bytes by themselves, and pieces with bytes to fall back on."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ["def add(a, b):\n    return a + b\n", "the quick brown fox jumps over the lazy dog", "中文 😀 é"]
SPECIAL = ["<pad>", "<bos>", "<eos>"]


def byte_level(vocab_size: int = 300) -> Any:
    """Byte-level BPE, as GPT-2 and the built-in model have it: any character may be split over tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def byte_fallback() -> Any:
    """Pieces that begin with a space mark, and a token for each byte, as Llama 2 and T5 have it."""
    words = ["▁the", "▁cat", "▁sat", "s", "a", "t", "▁", "h", "e", "c"]
    names = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    inner = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
            ignore_merges=True,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
