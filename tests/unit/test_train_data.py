"""Text, tokens and batches: the same data however it lies, and whoever reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import text, write_config

from amsf_dist.train import text as sources
from amsf_dist.train.batches import TrainBatches, validation_windows
from amsf_dist.train.config import DataConfig
from amsf_dist.train.config_file import load_config
from amsf_dist.train.errors import UserError
from amsf_dist.train.evaluation import bits_per_byte
from amsf_dist.train.text import documents
from amsf_dist.train.tokens import byte_tokenizer, load_tokenizer, open_tokens, write_tokens


def read(path: Path | None, **options: Any) -> list[str]:
    """Return the documents of a source."""
    found, rest = [], ""
    for piece, ends in documents(DataConfig(path=path and str(path), **options)):
        rest += piece
        if ends:
            found.append(rest)
            rest = ""
    assert not rest
    return found


def test_the_default_text_is_the_documentation_in_cpython() -> None:
    found = read(None)
    assert len(found) > 50 and sum(map(len, found)) > 300_000


def test_a_file_is_one_document_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    content = "".join(f"line {number} é\r\n" for number in range(100))
    path.write_bytes(content.encode())
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 10)
    assert len(list(documents(DataConfig(path=str(path))))) > 50
    assert read(path) == [content]


def test_a_folder_is_its_text_files_in_a_fixed_order(tmp_path: Path) -> None:
    for name, content in (("b.txt", b"second"), ("a/z.md", b"first"), ("c.py", b"third \xff")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "binary").write_bytes(b"no\0")
    assert read(tmp_path) == ["first", "second", "third \N{REPLACEMENT CHARACTER}"]


def test_a_datasets_directory_is_its_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "body": ["1", "2"]})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "rows") == read(tmp_path / "splits") == ["one", "two"]
    assert read(tmp_path / "rows", column="body") == ["1", "2"]
    with pytest.raises(UserError, match="no column txt; it has text, body"):
        read(tmp_path / "rows", column="txt")


@pytest.mark.parametrize("content", ["", None])
def test_a_source_without_text_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(UserError, match="no text file"):
        read(tmp_path)


def test_byte_tokens_are_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    sample = text(50) + " 漢字 🙂 \x00\x7f don't  <b>\r\n"
    ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
    assert ids == list(sample.encode()) and tokenizer.decode(ids) == sample
    assert tokenizer.eos_token_id == 256 and len(tokenizer) == 257


def test_tokens_are_written_once_and_again_when_the_text_changes(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    out, tokenizer = tmp_path / "run", load_tokenizer(config)
    write_tokens(config, tokenizer, out)
    first = open_tokens(config, out)
    whole = text().encode()
    assert len(first.validation) == int((len(whole) + 1) * 0.2)
    assert bytes(first.train.astype(np.uint8)) == whole[: len(first.train)]
    assert first.validation[-1] == 256
    stamp = (out / "tokens.bin").stat().st_mtime_ns
    write_tokens(config, tokenizer, out)
    assert (out / "tokens.bin").stat().st_mtime_ns == stamp
    (tmp_path / "text.txt").write_text(text() + "more")
    write_tokens(config, tokenizer, out)
    assert open_tokens(config, out).sha256 != first.sha256
    assert sorted(path.name for path in out.iterdir()) == ["tokens.bin", "tokens.json"]


def test_another_tokenizer_counts_its_own_tokens(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = write_config(tmp_path, data={"tokenizer": str(tmp_path / "tokenizer")})
    config = load_config(path)
    write_tokens(config, load_tokenizer(config), tmp_path / "a")
    plain = load_config(path, ["data.tokenizer=bytes"])
    write_tokens(plain, load_tokenizer(plain), tmp_path / "b")
    assert (tmp_path / "a/tokens.bin").read_bytes() == (tmp_path / "b/tokens.bin").read_bytes()


def test_batches_do_not_depend_on_who_reads_them() -> None:
    batches = TrainBatches(np.arange(1000), sequence_length=8, global_batch_size=6, seed=3)
    whole = batches.micro_batch(step=40, first=0, count=6)
    parts = [batches.micro_batch(step=40, first=first, count=2) for first in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts)) and whole.shape == (6, 9)
    again = TrainBatches(np.arange(1000), 8, 6, seed=3)
    assert torch.equal(whole, again.micro_batch(40, 0, 6))
    assert not torch.equal(whole, TrainBatches(np.arange(1000), 8, 6, seed=4).micro_batch(40, 0, 6))


def test_an_epoch_holds_every_window_once() -> None:
    batches = TrainBatches(np.arange(100), sequence_length=8, global_batch_size=1, seed=0)
    for epoch in range(3):
        steps = range(epoch * batches.num_windows, (epoch + 1) * batches.num_windows)
        starts = [int(batches.micro_batch(step, 0, 1)[0, 0]) for step in steps]
        assert len(set(starts)) == batches.num_windows == 11
        assert len({start % 8 for start in starts}) == 1


def test_validation_windows_cover_the_text_in_order() -> None:
    assert validation_windows(33, 8, None) == [0, 8, 16, 24]
    assert validation_windows(32, 8, None) == [0, 8, 16]
    assert validation_windows(33, 8, 2) == [0, 8]


def test_bits_per_byte_counts_bytes_and_not_tokens() -> None:
    targets = np.array([*"é".encode(), 256, ord("a")])
    assert bits_per_byte(np.log(2), targets, byte_tokenizer()) == pytest.approx(4 / 3)
