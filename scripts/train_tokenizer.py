"""Train the small tokenizer of the debug models: byte-level BPE on the training split of Python's standard library.

    python scripts/train_tokenizer.py [--out tests/assets/tokenizer] [--vocab-size 2048]

The same Python version gives the same file, byte for byte; the shipped one is of 3.11.7. Byte level, so that every
text can be encoded; the library's own splitting by words and spaces, which keeps indentation together.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from components.data.documents import BadRecord
from components.data.stdlib import open_stdlib

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def texts() -> Iterator[str]:
    """The documents of the training split that can be read."""
    documents = open_stdlib("train")
    for i in range(len(documents)):
        try:
            yield documents.document(i)
        except BadRecord as error:
            print(f"skipped: {error}")


def train(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` entries; the special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def main() -> None:
    """Train, and write tokenizer.json and tokenizer_config.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/assets/tokenizer"))
    parser.add_argument("--vocab-size", type=int, default=2048)
    args = parser.parse_args()
    tokenizer = train(args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{args.out}: {tokenizer.get_vocab_size()} entries")


if __name__ == "__main__":
    main()
