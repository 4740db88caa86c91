"""Digests that a start kept stand for a checkpoint's bytes only while these are the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import digests, weights
from engine.errors import CheckpointError
from engine.weights import Checkpoint
from kvc2.host import file_stamp
from kvc2.host.file_stamp import Stamp
from tests.doubles.checkpoints import make_mixtral, reshard, weights_digest

LOADED = "model.norm.weight"  # of any start
FILE = "model.safetensors"


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all reads; one tensor is a sample, and every clock is fine enough."""
    lengths: list[int] = []
    real = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        got = real(fd, buffers, offset)
        lengths.append(got)
        return got

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(weights, "_SAMPLE_BYTES", 1)
    monkeypatch.setattr(file_stamp, "_COARSE_NS", 0)
    return lengths


def start(model_dir: Path, kept: Path) -> bytes:
    """As a start that maps its experts: recalls, loads one tensor, digests and keeps."""
    with Checkpoint(model_dir, torch.float32) as checkpoint:
        checkpoint.recall(kept)
        (shape,) = [e.shape for name, e in checkpoint._entries.items() if name == LOADED]
        checkpoint.tensor(LOADED, *shape)
        digest = checkpoint.digest()
        checkpoint.keep(kept)
    return digest


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_mixtral(tmp_path / "model")


def test_the_second_start_reads_a_sample_and_what_it_loads(
    model_dir: Path, tmp_path: Path, read_bytes: list[int]
) -> None:
    kept = tmp_path / "kept"
    size = (model_dir / FILE).stat().st_size
    first = start(model_dir, kept)
    assert sum(read_bytes) >= size
    for _ in range(5):
        read_bytes.clear()
        assert start(model_dir, kept) == first
        assert sum(read_bytes) < size / 2
    assert first == weights_digest(model_dir)


def test_shards_are_recalled_together(
    model_dir: Path, tmp_path: Path, read_bytes: list[int]
) -> None:
    sharded, kept = reshard(model_dir, tmp_path / "sharded", 3), tmp_path / "kept"
    first = start(sharded, kept)
    read_bytes.clear()
    assert start(sharded, kept) == first
    assert sum(read_bytes) < (model_dir / FILE).stat().st_size / 2
    assert first == weights_digest(model_dir)


def flipped(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def in_place(path: Path) -> None:
    flipped(path, path.stat().st_size - 3)


def in_place_and_times_set_back(path: Path) -> None:
    before = path.stat()
    in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_by_a_copy_with_its_times(path: Path) -> None:
    beside = path.with_name("beside")
    shutil.copy2(path, beside)
    in_place_and_times_set_back(beside)
    beside.replace(path)


def through_a_mapping(path: Path) -> None:
    import mmap

    before = path.stat()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[-3] ^= 1
        memory.flush()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def behind_a_link(path: Path) -> None:
    other = path.with_name("other")
    replaced_by_a_copy_with_its_times(path)
    path.rename(other)
    path.symlink_to(other)


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        in_place_and_times_set_back,
        replaced_by_a_copy_with_its_times,
        through_a_mapping,
        behind_a_link,
    ],
)
@pytest.mark.usefixtures("read_bytes")
def test_whoever_changes_a_byte_changes_the_digest(
    model_dir: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    kept = tmp_path / "kept"
    first = start(model_dir, kept)
    change(model_dir / FILE)
    found = start(model_dir, kept)
    assert found == weights_digest(model_dir) != first
    assert start(model_dir, kept) == found


def lying(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    """Stamps stay what they are now, whatever happens to the file."""
    path = model_dir / FILE
    with path.open("rb") as file:
        now = Stamp.of(path, file.fileno())
    monkeypatch.setattr(Stamp, "of", lambda path, fd: now)


@pytest.mark.usefixtures("read_bytes")
def test_other_weights_under_the_same_stamp_are_found_by_a_sample(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept, other = tmp_path / "kept", make_mixtral(tmp_path / "other", initializer_range=0.1)
    monkeypatch.setattr(weights, "_SAMPLE_BYTES", 1 << 30)  # norms are ones in both
    first = start(model_dir, kept)
    lying(monkeypatch, model_dir)
    shutil.copy(other / FILE, model_dir / FILE)
    found = start(model_dir, kept)
    assert found == weights_digest(other) != first
    assert "has changed, and its stamp has not" in caplog.text


@pytest.mark.usefixtures("read_bytes")
def test_a_loaded_tensor_that_is_not_the_recalled_one_is_refused_once(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    start(model_dir, kept)
    lying(monkeypatch, model_dir)
    monkeypatch.setattr(Checkpoint, "_read_some", lambda _: None)  # the sample missed it
    with Checkpoint(model_dir, torch.float32) as checkpoint:
        flipped(model_dir / FILE, checkpoint._entries[LOADED].begin)
    with pytest.raises(CheckpointError, match="start again"):
        start(model_dir, kept)
    assert start(model_dir, kept) == weights_digest(model_dir)


@pytest.mark.usefixtures("read_bytes")
def test_a_damaged_file_of_digests_is_never_believed(model_dir: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    expected = start(model_dir, kept)
    whole = kept.read_bytes()
    for at in range(0, len(whole), 211):
        kept.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert start(model_dir, kept) == expected
        assert kept.read_bytes() == whole, at
    for length in (0, 1, 33, len(whole) - 1):
        kept.write_bytes(whole[:length])
        assert start(model_dir, kept) == expected


@pytest.mark.usefixtures("read_bytes")
def test_what_another_version_kept_is_not_used(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    start(model_dir, kept)
    with Checkpoint(model_dir, torch.float32) as checkpoint:
        stamps = [file.stamp for file in checkpoint._files]
    assert digests.load(kept, stamps) is not None
    monkeypatch.setattr(digests, "_VERSION", 2)
    assert digests.load(kept, stamps) is None


def test_nothing_is_kept_of_files_that_may_change_within_their_clocks_tick(
    model_dir: Path, tmp_path: Path
) -> None:
    os.utime(model_dir / FILE)
    start(model_dir, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.usefixtures("read_bytes")
def test_nothing_is_kept_of_a_file_that_was_touched_while_it_was_read(
    model_dir: Path, tmp_path: Path
) -> None:
    with Checkpoint(model_dir, torch.float32) as checkpoint:
        checkpoint.digest()
        (model_dir / FILE).chmod(0o640)
        checkpoint.keep(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.usefixtures("read_bytes")
def test_where_nothing_can_be_kept_the_digest_is_the_same(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = tmp_path / "no folder" / "kept"
    assert start(model_dir, missing) == weights_digest(model_dir)
    assert "digests are not kept" in caplog.text
