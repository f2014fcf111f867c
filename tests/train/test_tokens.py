"""Tokens of text, JSON lines and token files; and every kind of data that cannot be used is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers

from hasten.errors import ArgumentError, CheckpointError
from hasten.models import builtin
from hasten.train import tokens as module
from hasten.train.config import DataConfig
from hasten.train.tokens import open_tokens, prepare
from tests.engine.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
VOCAB = len(TOKENIZER)


def made(tmp_path, *paths, tokenizer=TOKENIZER, vocab=VOCAB, **options):
    config = DataConfig(paths=tuple(map(str, paths)), seqlen=4, **options)
    prepare(config, tokenizer, vocab, tmp_path / "run", "train")
    return open_tokens(tmp_path / "run", "train")


def texts(found):
    pieces = [found.arrays[array][start : start + length] for array, start, length in found.table]
    return [TOKENIZER.decode(piece.tolist()) for piece in pieces]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_files_are_a_document_each(tmp_path):
    data = tmp_path / "data"
    write(data / "b.txt", "second é")
    write(data / "a.txt", b"\xef\xbb\xbffirst")
    write(data / "sub" / "c.txt", "third")
    write(data / "empty.txt", "")
    write(data / "blank.txt", " \n")
    write(data / ".git" / "d.txt", "hidden")
    write(data / "e.py", "not asked for")
    found = made(tmp_path, data, include="*.txt")
    assert texts(found) == ["first<eos>", "second é<eos>", "third<eos>"]
    assert found.arrays[0].dtype == np.uint16
    assert found.num_tokens == sum(len(TOKENIZER(text)["input_ids"]) + 1 for text in ("first", "second é", "third"))


def test_json_lines_are_a_document_a_line(tmp_path):
    lines = [{"body": "one\u2028still one"}, {"body": "two", "other": 3}, {"body": ""}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    path.write_text(path.read_text().replace("\\u2028", "\u2028"))
    assert texts(made(tmp_path, path, text_field="body")) == ["one\u2028still one<eos>", "two<eos>"]


def test_a_first_token_is_put_where_the_tokenizer_puts_it(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.path())
    found = made(tmp_path, write(tmp_path / "a.txt", "def add"), tokenizer=tokenizer, vocab=len(tokenizer))
    assert found.arrays[0].tolist() == [*tokenizer("def add")["input_ids"], tokenizer.eos_token_id]
    assert found.arrays[0][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", ["a.bin", "a.npy"])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_token_files_are_read_where_they_lie(tmp_path, monkeypatch, name, at_once):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    ids = np.array([5, 6, 2, 7, 2, 2, 9, 8], dtype=np.uint16)
    path = tmp_path / name
    np.save(path, ids) if name.endswith("npy") else ids.tofile(path)
    found = made(tmp_path, path, path, separator=2)
    assert found.table.tolist() == [[a, s, n] for a in (0, 1) for s, n in ((0, 3), (3, 2), (5, 1), (6, 2))]
    assert not (tmp_path / "run" / "train.bin").exists()
    assert made(tmp_path / "plain", path, tokenizer=None).table.tolist() == [[0, 0, 8]]
    with path.open("ab") as file:
        file.write(b"1234")
    with pytest.raises(CheckpointError, match=r"is not as it was when the run began .*put it back"):
        open_tokens(tmp_path / "run", "train")


def test_tokens_are_made_once(tmp_path):
    path = write(tmp_path / "a.txt", "as it was")
    before = texts(made(tmp_path, path))
    path.write_text("changed since")
    assert texts(made(tmp_path, path)) == before


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("a.txt", "", {}, r"a\.txt, which is empty"),
        ("a.txt", " \n ", {}, "files with white space only"),
        ("a.txt", b"ab\0cd", {}, r"a\.txt, which is binary \(a NUL at byte 2\)"),
        ("a.txt", "é".encode("latin-1"), {}, r"text in UTF-8, got .*a\.txt, which is not at byte 0; save it"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', {}, r"JSON on each line, got .*a\.jsonl:2: "),
        ("a.jsonl", '{"body": "x"}\n', {}, r"a text 'text' on each line, got .*a\.jsonl:1: body; name the field"),
        ("a.jsonl", "[1]\n", {}, r"a\.jsonl:1: list"),
        ("a.bin", b"\1\0\2", {}, r"a token file of uint16, got .*a\.bin"),
        ("a.bin", b"\1\0\2\0", {"token_dtype": "uint32"}, r"token ids from 0 to 299, got 131073 in .*a\.bin"),
        ("a.npy", b"no header", {}, r"a token file of uint16, got .*a\.npy"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_data_that_cannot_be_used_is_named(tmp_path, name, content, options, message):
    with pytest.raises(ArgumentError, match=message):
        made(tmp_path, write(tmp_path / name, content), **options)
    assert not (tmp_path / "run" / "train.json").exists()


def test_paths_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"a file or a folder, got .*nowhere, which is not there"):
        made(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match=r"no file that is not empty and matches '\*' in "):
        made(tmp_path, tmp_path)
    text, ids = write(tmp_path / "a.txt", "x"), write(tmp_path / "b.bin", b"\1\0")
    with pytest.raises(ArgumentError, match="text or token files, got both"):
        made(tmp_path, text, ids)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", "x")
    with pytest.raises(ArgumentError, match="tokenizer: expected ids below the model's 2"):
        made(tmp_path, path, vocab=2)
    with pytest.raises(ArgumentError, match="tokenizer: expected one for text, got none beside the model"):
        made(tmp_path, path, tokenizer=None)


def test_two_dimensions_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 3), dtype=np.uint16))
    with pytest.raises(ArgumentError, match=r"uint16 of shape \(2, 3\)"):
        made(tmp_path, tmp_path / "a.npy")
