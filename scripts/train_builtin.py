"""Train the model that ships inside the package, on the Python source found on this machine.

    python scripts/train_builtin.py --out builtin --seconds 420

Writes a folder that transformers loads as it is (bf16 safetensors, tokenizer, configuration) and
training.json, the record of data, versions, speed, losses and bits per byte. `--smoke` runs every step
in under a minute on a CPU. Copy the folder's files into src/hasten/models/builtin/ to ship them.
"""

import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from builtin_data import BOS, EOS, PAD, SPECIAL_TOKENS, VOCAB_SIZE
from builtin_loop import Crops, Progress, Schedule, Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

CONTEXT = 8192
RESERVE_S = 45  # kept free of training before the deadline: evaluation, samples, saving
MAX_WEIGHT_BYTES = 16_000_000

PROMPTS = (
    "def fibonacci(n):",
    "def is_prime(n):\n",
    'def read_json(path):\n    """Read a JSON file and return its content."""\n',
    "def binary_search(items, target):\n    low, high = 0, len(items) - 1\n",
    "import os\n\ndef list_files(directory, suffix='.py'):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "class MLP(nn.Module):\n    def __init__(self, hidden_size, intermediate_size):\n",
    "def count_words(text):\n    counts = {}\n    for word in text.split():\n",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--seconds", type=float, default=420, help="time budget of the training loop")
    parser.add_argument("--deadline", type=float, default=560, help="seconds from the start to the end of everything")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--batch-tokens", type=int, default=262_144)
    parser.add_argument("--seqlen", type=int, default=2048, help="crop length until the long phase")
    parser.add_argument("--long-seqlen", type=int, default=CONTEXT, help="crop length of the last 18 %% of the time")
    parser.add_argument("--rope-theta", type=float, default=50_000.0)
    parser.add_argument("--workers", type=int, default=None, help="processes for data (default: all cores)")
    parser.add_argument("--data", type=Path, help="folder of arrays already made by builtin_data.py")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="every step on a slice: tests the script, not the model")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.compile is None:
        args.compile = args.device == "cuda"
    if args.smoke:
        args.seconds, args.batch_tokens, args.seqlen, args.long_seqlen = min(args.seconds, 12), 256, 64, 128
        args.workers = args.workers or 2
    return args


def start_data(args: argparse.Namespace, folder: Path) -> subprocess.Popen[bytes] | None:
    """Collect and tokenise in another process, while this one compiles."""
    if args.data:
        return None
    command = [sys.executable, str(Path(__file__).with_name("builtin_data.py")), "--out", str(folder)]
    command += ["--workers", str(args.workers)] if args.workers else []
    return subprocess.Popen(command + (["--smoke"] if args.smoke else []))


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():  # the residual stream starts with the same variance at every depth
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f} M parameters", flush=True)
    return model.to(args.device)


def save_weights(model: LlamaForCausalLM, out: Path) -> None:
    """bf16 weights and configuration; the model in training keeps its own precision."""
    shipped = LlamaForCausalLM._from_config(model.config, dtype=torch.bfloat16)
    shipped.load_state_dict(model.state_dict())
    shipped.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    shipped.save_pretrained(out)
    num_bytes = (out / "model.safetensors").stat().st_size
    if num_bytes > MAX_WEIGHT_BYTES:
        raise ValueError(f"model.safetensors has {num_bytes} bytes, expected at most {MAX_WEIGHT_BYTES}")


def save_tokenizer(file: Path, out: Path) -> Any:
    bos, eos, pad = SPECIAL_TOKENS
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def check_tokenizer(out: Path) -> Any:
    """The saved tokenizer, loaded as users load it; raises if it loses or adds a character."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "def f(x):\n\tif x:\n        return 'é 世界 🙂'  # \x00 \r\n\n\n    \u2028 ."
    ids = tokenizer(text)["input_ids"]
    if len(tokenizer) != VOCAB_SIZE or ids[0] != BOS or tokenizer.decode(ids[1:]) != text:
        raise ValueError(f"the tokenizer is not lossless: {tokenizer.decode(ids)!r}, {len(tokenizer)} tokens")
    return tokenizer


@torch.inference_mode()
def total_nll(model: Any, tokens: Tensor, context: int, batch_tokens: int) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) of all tokens but the first, and their number.

    The stream is cut into windows of `context` tokens, each scored from nothing but its own past.
    """
    total, count = 0.0, 0
    rows = max(1, batch_tokens // context)
    for begin in range(0, tokens.numel() - 1, rows * context):
        piece = tokens[begin : begin + rows * context + 1].long()
        cut = (piece.numel() - 1) // context * context or piece.numel() - 1
        for part in (piece[: cut + 1], piece[cut:]):
            if part.numel() < 2:
                continue
            window = min(context, part.numel() - 1)
            logits = model(part[:-1].view(-1, window), use_cache=False).logits  # (rows, window, vocab)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), part[1:], reduction="sum")
            total, count = total + float(loss), count + part.numel() - 1
    return total, count


def evaluate(model: Any, tokens: Tensor, num_bytes: float, contexts: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Loss per token and bits per byte (of UTF-8 text) at each context; eos and bos are scored too."""
    results = {}
    for context in contexts:
        nll, count = total_nll(model, tokens, context, 65_536)
        results[str(context)] = {
            "loss": round(nll / count, 4),
            "bits_per_byte": round(nll / math.log(2) / num_bytes, 4),
        }
    return results


def samples(model: Any, tokenizer: Any, max_new_tokens: int) -> list[dict[str, Any]]:
    """Completions of PROMPTS, greedy and at temperature 0.3, printed as they come."""
    found = []
    torch.manual_seed(0)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        for temperature in (0.0, 0.3):
            choice: dict[str, Any] = {"do_sample": temperature > 0, "temperature": temperature or None}
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **choice)[0]
            text = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found.append({"prompt": prompt, "temperature": temperature, "completion": text})
            print(f"---- temperature {temperature}\n{prompt}\033[1m{text}\033[0m", flush=True)
    return found


def load_tokens(folder: Path, name: str, device: str) -> Tensor:
    return torch.from_numpy(np.fromfile(folder / f"{name}.bin", dtype=np.uint16).astype(np.int32)).to(device)


def describe_run(args: argparse.Namespace, trainer: Trainer, progress: Progress) -> dict[str, Any]:
    is_cuda = args.device == "cuda"
    return {
        "command": " ".join(["python scripts/train_builtin.py", *sys.argv[1:]]).replace(str(args.out), args.out.name),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if is_cuda else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "args": {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()},
        "compiled": trainer.is_compiled,
        "seconds": round(progress.seconds, 1),
        "steps": progress.step,
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.tokens / progress.seconds),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "train_loss": progress.history,
    }


def main() -> None:
    begin = time.perf_counter()
    args = parse_args()
    torch.set_float32_matmul_precision("high")
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or Path(scratch)
        data = start_data(args, folder)
        try:
            train_and_record(args, folder, data, begin)
        finally:
            if data and data.poll() is None:
                data.kill()


def train_and_record(
    args: argparse.Namespace, folder: Path, data: subprocess.Popen[bytes] | None, begin: float
) -> None:
    def stamp(what: str) -> None:
        print(f"[{time.perf_counter() - begin:6.1f} s] {what}", flush=True)

    schedule = Schedule(
        seconds=args.seconds,
        peak_lr=args.lr,
        batch_tokens=args.batch_tokens,
        seqlen=args.seqlen,
        long_seqlen=args.long_seqlen,
    )
    model = build_model(args)
    trainer = Trainer(model, schedule, args.optimizer, args.compile)
    trainer.warm_up()
    stamp("warm-up done")
    if data and data.wait() != 0:
        raise SystemExit(f"builtin_data.py failed with exit status {data.returncode}")
    stamp("data ready")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(folder / "tokenizer.json", args.out)
    check_tokenizer(args.out)
    source = json.loads((folder / "data.json").read_text())
    train, val = load_tokens(folder, "train", args.device), load_tokens(folder, "val", args.device)
    val_slice = val[: (1 << 18) + 1] if not args.smoke else val[:2049]
    checks: list[dict[str, Any]] = []

    def save(progress: Progress) -> None:
        save_weights(model, args.out)
        with trainer.autocast():
            nll, count = total_nll(model, val_slice, min(1024, args.long_seqlen), 65_536)
        checks.append({"step": progress.step, "tokens": progress.tokens, "val_loss_part": round(nll / count, 4)})
        record = describe_run(args, trainer, progress) | {"data": source, "checkpoints": checks}
        (args.out / "training.json").write_text(json.dumps(record, indent=1))
        stamp(f"checkpoint: {checks[-1]}")

    left = args.deadline - RESERVE_S - (time.perf_counter() - begin)
    trainer.schedule = schedule = schedule.within(left)
    stamp(f"training for {schedule.seconds:.0f} s on {train.numel() / 1e6:.1f} M tokens")
    progress = trainer.run(Crops(train, tokenizer.get_vocab(), args.long_seqlen), save)
    judge(args, source, val, stamp)
    stamp(f"done: {progress.step} steps, {progress.tokens / 1e6:.0f} M tokens")
    for file in sorted(args.out.iterdir()):
        print(f"  {file.stat().st_size:10d} {file.name}")


def judge(args: argparse.Namespace, source: dict[str, Any], val: Tensor, stamp: Callable[[str], None]) -> None:
    """Load what was saved, as users load it; add its bits per byte and samples to training.json."""
    shipped = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(args.device).eval()
    tokenizer = check_tokenizer(args.out)
    record_file = args.out / "training.json"
    record = json.loads(record_file.read_text())
    val = val[:2049] if args.smoke else val
    num_bytes = source["val_bytes"] * val.numel() / source["val_tokens"]
    record["validation"] = evaluate(shipped, val, num_bytes, (1024, args.long_seqlen))
    record_file.write_text(json.dumps(record, indent=1))
    stamp(f"validation of the saved model: {record['validation']}")
    record["samples"] = samples(shipped, tokenizer, 24 if args.smoke else 96)
    record_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
