"""The model of a run: loaded or begun from random weights, accelerated, and asked for a loss instead of logits.

Models are transformers' own and stay so: what is trained is saved under the same names. Knows no data and no optimizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from hasten.convert import carried
from hasten.errors import ArgumentError, CheckpointError
from hasten.models import accelerate, builtin
from hasten.train.loss import cross_entropy, linear_cross_entropy

BUILTIN = "builtin"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Loaded:
    """A model in float32 on the CPU, in training mode, its tokenizer if there is one, and how it attends.

    identity: a digest of its configuration, equal for the same architecture and sizes. folder: where it came from.
    dtype: of the checkpoint, float32 for a model begun from random weights.
    """

    model: Any
    tokenizer: Any
    attention: str
    identity: str
    folder: Path
    dtype: torch.dtype


def load(name: str, *, tokenizer: str | None = None, attention: str = "hasten", seed: int = 0) -> Loaded:
    """Load a causal language model from a local folder; one without weights begins from random ones, by `seed`.

    name: a folder that save_pretrained wrote, a folder or a file with only a configuration, or "builtin". attention:
    "hasten" accelerates the model, or says in `Loaded.attention` why it keeps its own. Nothing is downloaded and no
    code of a checkpoint is run. Raises CheckpointError for what cannot be loaded or is no causal language model.
    """
    path = builtin.path() if name == BUILTIN else Path(name).expanduser()
    folder = path.parent if path.is_file() else path
    config = _config(path)
    torch.manual_seed(seed)
    stored = config.dtype if isinstance(getattr(config, "dtype", None), torch.dtype) else torch.float32
    own = attention if attention != "hasten" else "sdpa"
    has_weights = path.is_dir() and any(folder.glob("*.safetensors"))
    try:
        if has_weights:
            options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, attn_implementation=own, output_loading_info=True, **options
            )
            _check_whole(folder, report["missing_keys"])
        else:
            stored = torch.float32
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=own, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        problem = f"cannot be trained as a causal language model: {_first_line(error)}"
        raise CheckpointError(path, problem, "give a decoder such as Llama, Qwen, Gemma, Phi or GPT-2") from error
    if attention == "hasten":
        try:
            accelerate(model)
        except ArgumentError as error:  # its attention layers cannot be reached; it trains all the same
            attention = f"its own ({error})"
    digest = hashlib.sha256(json.dumps(_sizes(config), sort_keys=True).encode()).hexdigest()[:16]
    return Loaded(model.train(), _tokenizer(tokenizer, folder), attention, digest, folder, stored)


class LanguageModel(nn.Module):
    """A causal language model that returns the summed loss of its labels; weights keep their names under `model.`.

    Where its logits are its last hidden states times its output weights (times a softcap), they never exist as a
    whole; that is tried once, on a few tokens, when this is made. Others give logits, in their own dtype. Tried as
    well: that packed documents do not see each other. Raises ArgumentError if they do.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.is_flat = False
        with _evaluating(model):
            self.is_fused = _has_plain_head(model, self.softcap)
            if not self._keeps_apart():
                # transformers' GPT-OSS makes its masks without positions; hasten's attention can be told otherwise
                self.is_flat = str(model.config._attn_implementation).startswith("hasten")
                if not self.is_flat or not self._keeps_apart():
                    got = f"{type(model).__name__}, where they see each other"
                    hint = "accelerate it (--attention hasten), or train another model"
                    raise ArgumentError("model", "one that keeps packed documents apart", got, hint)

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropies, () float32. ids, positions, labels: int64 (rows, seqlen), see `data.Batch`."""
        given = self._inputs(ids, positions)
        if not self.is_fused:
            return cross_entropy(self.model(**given).logits.flatten(0, 1), labels.flatten())
        hidden = self.model.base_model(**given).last_hidden_state
        head = self.model.get_output_embeddings()
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, labels, bias=head.bias, softcap=self.softcap)

    def _inputs(self, ids: Tensor, positions: Tensor) -> dict[str, Any]:
        if not self.is_flat:
            return {"input_ids": ids, "position_ids": positions, "use_cache": False}
        # one row, and where documents begin in it: room for every token, so that no value has to be read
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
        count = ids.shape[1]
        at = torch.arange(count, device=ids.device)
        begins = torch.where(positions[0] == 0, at, count).sort().values
        cu_seqlens = F.pad(begins, (0, 1), value=count).to(torch.int32)
        return {"input_ids": ids, "position_ids": positions, "use_cache": False, "cu_seq_lens_q": cu_seqlens}

    def _keeps_apart(self) -> bool:
        """Tell whether the hidden states of a document are the same behind another one as alone."""
        ids, positions = _few_tokens(self.model, 3)
        alone = self.model.base_model(**self._inputs(ids, positions)).last_hidden_state
        double = self._inputs(ids.repeat(1, 2).flip(1), positions.repeat(1, 2))
        double["input_ids"][:, 3:] = ids
        packed = self.model.base_model(**double).last_hidden_state[:, 3:]
        return bool((packed - alone).abs().max() <= 1e-5 * alone.abs().max())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a transformers model, in order: what is sharded, compiled and computed again by itself."""
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) > 0]
    longest = max(lists, key=lambda one: sum(weight.numel() for weight in one.parameters()), default=None)
    return [] if longest is None else list(longest)


def enable_recompute(model: Any) -> None:
    """Keep only the inputs of each layer for the backward, and compute the rest again."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


def _few_tokens(model: Any, count: int) -> tuple[Tensor, Tensor]:
    """(ids, positions), int64 (1, count) each."""
    weight = model.get_input_embeddings().weight
    positions = torch.arange(count, device=weight.device)[None]
    return positions % weight.shape[0], positions


def _has_plain_head(model: Any, softcap: float | None) -> bool:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    ids, positions = _few_tokens(model, 3)
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    logits = model(**given).logits
    made = head(model.base_model(**given).last_hidden_state)
    made = made if softcap is None else softcap * torch.tanh(made / softcap)
    return made.shape == logits.shape and bool(torch.allclose(made, logits, rtol=1e-4, atol=1e-5))


def _config(path: Path) -> Any:
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        hint = "give a folder that save_pretrained wrote, a config.json, or builtin; nothing is downloaded"
        raise CheckpointError(path, "no configuration there" if path.exists() else "not there", hint)
    carried.register()  # what a conversion wrote is found without running the checkpoint's code
    try:
        return transformers.AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        hint = "transformers must know the architecture; a checkpoint's code is not run"
        raise CheckpointError(file, f"cannot be read: {_first_line(error)}", hint) from error


def _check_whole(folder: Path, missing: Any) -> None:
    if missing:
        problem = f"{len(missing)} weights are missing, the first is {sorted(missing)[0]}"
        raise CheckpointError(folder, problem, "the weights belong to another architecture, or a part is lost")


def _sizes(config: Any) -> dict[str, Any]:
    """The configuration without what says nothing of the weights."""
    written = config.to_dict()
    vague = ("transformers_version", "_name_or_path", "use_cache", "dtype", "torch_dtype", "architectures")
    return {name: value for name, value in written.items() if name not in vague}


def _tokenizer(name: str | None, beside: Path) -> Any:
    if name is None and not any((beside / file).is_file() for file in _TOKENIZERS):
        return None
    folder = beside if name is None else builtin.path() if name == BUILTIN else Path(name).expanduser()
    if not folder.is_dir():
        raise CheckpointError(folder, "no tokenizer there", "give a folder that save_pretrained wrote")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        problem = f"its tokenizer cannot be loaded: {_first_line(error)}"
        raise CheckpointError(folder, problem, "save the tokenizer again, or give --tokenizer FOLDER") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
