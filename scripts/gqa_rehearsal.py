"""What each way of merging key/value heads costs the built-in model, without any training afterwards.

    python scripts/gqa_rehearsal.py --tokens 65536

Bits per byte on files of the standard library that the built-in model was not trained on (the same split by digest
as `builtin_data.py`); calibration text is from the files it was trained on. One JSON object a line, then a table.
"""

import argparse
import json
import math
import platform
import time
from typing import Any

import tokenizers
import torch
import transformers
from builtin_data import BOS, EOS, Source, is_validation, list_files, read
from torch import Tensor
from train_builtin import total_nll

from hasten.convert import gqa, source
from hasten.models import builtin

WAYS = (
    ("mean", "contiguous", False),
    ("first", "contiguous", False),
    ("random", "contiguous", False),
    ("aligned", "contiguous", False),
    ("aligned", "contiguous", True),
    ("aligned", "clustered", True),
    ("factored", "contiguous", False),
    ("factored", "contiguous", True),
    ("factored", "clustered", True),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536, help="held-out tokens to score")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--seeds", type=int, default=3, help="draws of the random method")
    return parser.parse_args()


def documents() -> tuple[list[Source], list[Source]]:
    """(trained on, held out) files of the standard library, in a fixed shuffled order."""
    found = [one for one in map(read, list_files(stdlib_only=True)[0]) if isinstance(one, Source)]
    found.sort(key=lambda one: one.digest[8:])
    return [one for one in found if not is_validation(one)], [one for one in found if is_validation(one)]


def tokens(sources: list[Source], tokenizer: Any, count: int) -> tuple[Tensor, int]:
    """(the first documents as bos, ids, eos, at least `count` tokens if there are so many; their bytes)."""
    ids: list[int] = []
    num_bytes = 0
    for one in sources:
        if len(ids) >= count:
            break
        ids += [BOS, *tokenizer(one.text, add_special_tokens=False, verbose=False)["input_ids"], EOS]
        num_bytes += one.num_bytes
    return torch.tensor(ids), num_bytes


def main() -> None:
    args = parse_args()
    transformers.utils.logging.disable_progress_bar()
    model = source.load_model(builtin.path()).float()
    tokenizer = source.load_tokenizer(builtin.path())
    trained, held_out = documents()
    text, num_bytes = tokens(held_out, tokenizer, args.tokens)
    seen = tokens(trained, tokenizer, args.calibration_tokens)[0][: args.calibration_tokens].view(-1, 512)
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "held_out_files": len(held_out),
        "tokens": text.numel(),
        "bytes": num_bytes,
        "calibration_tokens": seen.numel(),
        "context": args.context,
    }
    print(json.dumps(facts), flush=True)

    def bits(candidate: Any) -> float:
        return total_nll(candidate, text, args.context, 8 * args.context)[0] / math.log(2) / num_bytes

    rows: dict[str, dict[int, str]] = {}
    print(json.dumps({"multi-head": bits(model)}), flush=True)
    for method, groups, has_text in WAYS:
        for count in args.kv_heads:
            begin = time.perf_counter()
            seeds = range(args.seeds) if method == "random" else range(1)
            options = {"method": method, "groups": groups, "calibration": list(seen.split(8)) if has_text else None}
            found = [bits(gqa.to_gqa(model, count, seed=seed, **options)) for seed in seeds]
            name = f"{method}, {groups}, {'calibrated' if has_text else 'weights only'}"
            record = {"way": name, "kv_heads": count, "bits_per_byte": found, "s": time.perf_counter() - begin}
            print(json.dumps(record), flush=True)
            spread = f" ± {(max(found) - min(found)) / 2:.3f}" if len(found) > 1 else ""
            rows.setdefault(name, {})[count] = f"{sum(found) / len(found):.3f}{spread}"
    print("| way | " + " | ".join(f"G = {count}" for count in args.kv_heads) + " |")
    print("|---" * (len(args.kv_heads) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells[count] for count in args.kv_heads) + " |")


if __name__ == "__main__":
    main()
