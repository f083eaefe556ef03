"""From text to one long array of token numbers on disk, mapped by every process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from amsf_dist.train.config import Config
from amsf_dist.train.errors import UserError, one_line
from amsf_dist.train.heartbeat import beat
from amsf_dist.train.model import model_directory
from amsf_dist.train.text import documents, signature

__all__ = [
    "Tokens",
    "byte_tokenizer",
    "check_enough_text",
    "load_tokenizer",
    "open_tokens",
    "write_tokens",
]

END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer whose token numbers are the bytes of UTF-8, and 256 the end of a text.

    It is an ordinary `tokenizers` file once saved, so an exported model needs no code of ours.
    """
    # GPT-2's printable stand-ins: the printable bytes keep their code point, the others follow 255.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable}
    stand_in.update({byte: chr(256 + place) for place, byte in enumerate(others)})
    vocabulary = {stand_in[byte]: byte for byte in range(256)} | {END_OF_TEXT: 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a config; reads local files only.

    Raises:
        UserError: if there is no tokenizer where the config says, or it has no end-of-text token.
    """
    directory = config.tokenizer_directory
    if directory is None:
        return byte_tokenizer()
    if directory == config.model.path:
        model_directory(config)
    elif not Path(directory).is_dir():
        raise UserError(
            f"data.tokenizer: {directory} is not a directory (looked at "
            f"{Path(directory).absolute()}); give one with a tokenizer, or bytes, model, auto"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise UserError(
            f"data.tokenizer: no tokenizer can be read from {directory} "
            f"({one_line(error, 200)}); save one there, or set data.tokenizer=bytes"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.tokenizer: the tokenizer in {directory} has no eos_token, which is put "
            "between documents; set one and save it"
        )
    return tokenizer


@dataclass(frozen=True)
class Tokens:
    """The token array of a run, in two parts.

    Attributes:
        train: [num_train] token numbers, memory-mapped.
        validation: [num_validation], the end of the same text.
        sha256: of all tokens: the data a checkpoint was trained on.
    """

    train: np.ndarray
    validation: np.ndarray
    sha256: str


@dataclass(frozen=True)
class _Header:
    """What tokens.json says about tokens.bin beside it."""

    source: list[Any]
    tokenizer: str
    dtype: str
    count: int
    sha256: str


def write_tokens(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    trained_on: str | None = None,
) -> None:
    """Tokenize the text into `directory`, unless it lies there already. One process does it.

    Args:
        config: the job.
        tokenizer: its tokenizer.
        directory: gets tokens.bin and tokens.json.
        trained_on: sha256 of the tokens that a checkpoint was trained on; None: there is none.

    Raises:
        UserError: if the source has no text, or not the text of the checkpoint; nothing is
            written then.
    """
    # Through JSON once, so that it compares equal with what is read back.
    source = json.loads(json.dumps(signature(config.data)))
    name = config.tokenizer_directory or "bytes"
    header_path = directory / "tokens.json"
    if header_path.exists() and (directory / "tokens.bin").exists():
        header = _Header(**json.loads(header_path.read_text()))
        if (header.source, header.tokenizer) == (source, name):
            return
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    count, digest = 0, hashlib.sha256()
    partial = directory / f"tokens.bin.{os.getpid()}.tmp"
    try:
        with partial.open("wb") as file:
            for piece in _encode(config, tokenizer, dtype):
                count += len(piece)
                digest.update(piece.tobytes())
                file.write(piece.tobytes())
                beat()
        if trained_on not in (None, digest.hexdigest()):
            raise UserError(
                f"data.path: the text is not the one that the checkpoints in {directory} were "
                "trained on; change it back, or give another output_dir"
            )
        header_path.unlink(missing_ok=True)
        os.replace(partial, directory / "tokens.bin")
    finally:
        partial.unlink(missing_ok=True)
    header = _Header(source, name, dtype.str, count, digest.hexdigest())
    temporary = header_path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(asdict(header)))
    os.replace(temporary, header_path)


def check_enough_text(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a UserError if the text is too short for the config; reads only as far as it must."""
    count = 0
    for piece in _encode(config, tokenizer, np.dtype("<u4")):
        count += len(piece)
        if _is_enough(config, count):
            return
    raise UserError(
        f"data.path: {config.data.path} has {count} tokens, too few for data.sequence_length="
        f"{config.data.sequence_length} with data.validation_fraction="
        f"{config.data.validation_fraction}; give more text or shorter sequences"
    )


def open_tokens(config: Config, directory: Path) -> Tokens:
    """Map the tokens that `write_tokens` left, split into training and validation.

    Raises:
        UserError: if they are not there: the first process wrote them on another machine's disk.
    """
    if not (directory / "tokens.json").is_file():
        raise UserError(
            f"output_dir: {directory} lacks what the first process wrote there; "
            "give a directory that all machines share"
        )
    header = _Header(**json.loads((directory / "tokens.json").read_text()))
    num_train = header.count - int(header.count * config.data.validation_fraction)
    array = np.memmap(directory / "tokens.bin", dtype=header.dtype, mode="r", shape=(header.count,))
    return Tokens(array[:num_train], array[num_train:], header.sha256)


def _is_enough(config: Config, count: int) -> bool:
    """True if both parts hold a window: sequence_length + 1 tokens, at an offset below that."""
    num_validation = int(count * config.data.validation_fraction)
    length = config.data.sequence_length
    return num_validation >= length + 1 and count - num_validation >= 2 * length


def _encode(
    config: Config, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype
) -> Iterator[np.ndarray]:
    end = np.array([tokenizer.eos_token_id], dtype)
    for text, ends_document in documents(config.data):
        if config.tokenizer_directory is None:
            # The same numbers as tokenizer(text), which a test proves, a thousand times faster.
            yield np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(dtype)
        else:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            yield np.array(ids, dtype)
        if ends_document:
            yield end
