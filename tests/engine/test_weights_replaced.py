"""Other weights in the same place are another model, however they came there; and what is loaded
stays what it was, and is what was digested."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from engine.errors import CheckpointError
from engine.models import load_model
from engine.weights import Checkpoint
from tests import ROOT
from tests.doubles.checkpoints import make_mixtral
from tests.doubles.checkpoints import weights_digest as digest

FILE = "model.safetensors"
PLACE = f"model/{FILE}"
TIME_S = 1_000_000_000  # both files' modification time
MARK, OTHER_MARK = b"AAAAAAAA", b"BBBBBBBB"

# Each puts the file `other`, of equal size and time, in the place of PLACE.
WAYS = {
    "cp": f"cp other {PLACE}",
    "cp -p": f"cp -p other {PLACE}",
    "cp through a hard link": f"ln {PLACE} link && cp -p other link",
    "mv": f"mv other {PLACE}",
    "mv of a copy": f"cp -p other {PLACE}.part && mv {PLACE}.part {PLACE}",
    "rm and tar x": f"mkdir packed && cp other packed/{FILE} && tar --mtime=@{TIME_S} -C packed -cf"
    f" packed.tar {FILE} && rm {PLACE} && tar -C model -xf packed.tar",
    "tar x over it": f"mkdir packed && cp -p other packed/{FILE} && tar -C packed -cf packed.tar"
    f" {FILE} && tar -C model -xf packed.tar",
    "rsync -a": f"rsync -a --ignore-times other {PLACE}",
    "rsync --inplace": f"rsync -a --ignore-times --inplace other {PLACE}",
    "ln -sf": f'ln -sf "$PWD/other" {PLACE}',
    "ln -f": f"ln -f other {PLACE}",
    "mv of the directory": f"mv model old && mkdir model && cp -p other {PLACE}",
    "ln -sfn of the directory": "mv model old && mkdir new && cp -p other new/model.safetensors"
    " && ln -sfn new model",
    "sed -i": f"sed -i s/AAAAAAAA/BBBBBBBB/g {PLACE} && touch -r other {PLACE}",
    "dd": f"dd if=other of={PLACE} conv=notrunc status=none && touch -r other {PLACE}",
}


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with weights in PLACE and `other`, and both with one size and time."""
    marks = torch.frombuffer(bytearray(MARK * 64), dtype=torch.float32)
    noise = torch.frombuffer(bytearray(random.Random(0).randbytes(1 << 16)), dtype=torch.bfloat16)
    data = save({"a": marks, "b": noise})
    (tmp_path / "model").mkdir()
    for name, content in ((PLACE, data), ("other", data.replace(MARK, OTHER_MARK))):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (TIME_S, TIME_S))
    return tmp_path


def digest_elsewhere(file: Path, folder: Path) -> bytes:
    """Of the same bytes, where no digest was ever made."""
    folder.mkdir()
    shutil.copyfile(file, folder / FILE)
    return digest(folder)


@pytest.mark.parametrize("way", WAYS)
def test_replaced_weights_have_their_own_digest(place: Path, way: str) -> None:
    tool = WAYS[way].split()[0]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    expected = digest_elsewhere(place / "other", place / "elsewhere")
    before = digest(place / "model")
    bytewise = os.environ | {"LC_ALL": "C"}
    subprocess.run(["sh", "-ec", WAYS[way]], cwd=place, check=True, env=bytewise)
    assert digest(place / "model") == expected != before


def test_a_write_through_a_mapping_is_seen(place: Path) -> None:
    expected = digest_elsewhere(place / "other", place / "elsewhere")
    before = digest(place / "model")
    with (place / PLACE).open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:] = (place / "other").read_bytes()
    os.utime(place / PLACE, (TIME_S, TIME_S))
    assert digest(place / "model") == expected != before


def test_an_overlay_mount_is_seen(place: Path) -> None:
    """In a mount namespace of its own: the file below, then the one copied up, then another
    mount in the same place."""
    for name in ("upper", "work", "merged"):
        (place / name).mkdir()
    mount = "mount -t overlay overlay -o lowerdir=model,upperdir=upper,workdir=work merged"
    unshared = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    tried = subprocess.run([*unshared, mount], cwd=place, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine mounts no overlay: {tried.stderr.strip()}")
    tell = f"{sys.executable} -m tests.engine.test_weights_replaced merged"
    script = f"{mount}; {tell}; cp -p other merged/{FILE}; {tell}; umount merged; {tell}"
    (place / "merged" / FILE).write_bytes((place / PLACE).read_bytes())
    root = ROOT
    told = subprocess.run(
        [*unshared, script],
        cwd=place,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    before = digest(place / "model").hex()
    after = digest_elsewhere(place / "other", place / "elsewhere").hex()
    assert told.stdout.split() == [before, after, before]


def write_in_place(path: Path, data: bytes) -> None:
    """As a program does that puts the modification time back."""
    facts = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_what_is_digested_is_what_was_loaded(place: Path) -> None:
    """Overwritten between two tensors, unseen by any time stamp: neither model's digest."""
    other = (place / "other").read_bytes()
    before, after = digest(place / "model"), digest_elsewhere(place / "other", place / "elsewhere")
    with Checkpoint(place / "model", torch.float32) as checkpoint:
        loaded = checkpoint.tensor("a", 128)
        write_in_place(place / PLACE, other)
        assert checkpoint.digest() == before
    assert loaded.numpy().tobytes() == MARK * 64
    assert digest(place / "model") == after


def test_a_tensor_read_twice_is_the_same_or_refused(place: Path) -> None:
    with Checkpoint(place / "model", torch.float32) as checkpoint:
        checkpoint.tensor("a", 128)
        write_in_place(place / PLACE, (place / "other").read_bytes())
        with pytest.raises(CheckpointError, match=r"model\.safetensors was written while"):
            checkpoint.tensor("a", 128)


def test_a_file_written_while_it_is_read_is_refused(place: Path) -> None:
    with Checkpoint(place / "model", torch.float32) as checkpoint:
        checkpoint.tensor("a", 128)
        (place / PLACE).write_bytes((place / "other").read_bytes())
        with pytest.raises(CheckpointError, match=r"model\.safetensors was written while"):
            checkpoint.digest()


def test_a_file_cut_while_it_is_read_is_refused(place: Path) -> None:
    with Checkpoint(place / "model", torch.float32) as checkpoint:
        os.truncate(place / PLACE, 1000)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is shorter"):
            checkpoint.tensor("b", 1 << 15)


def test_a_file_replaced_while_it_is_read_is_read_to_its_end(place: Path) -> None:
    before = digest(place / "model")
    with Checkpoint(place / "model", torch.float32) as checkpoint:
        checkpoint.tensor("a", 128)
        (place / "other").rename(place / PLACE)
        assert checkpoint.digest() == before


def zeros(path: Path) -> None:
    data = path.read_bytes()
    start = header_bytes(data)
    write_in_place(path, data[:start] + bytes(len(data) - start))


def cut(path: Path) -> None:
    os.truncate(path, 8)


@pytest.mark.parametrize("harm", [zeros, cut, Path.unlink])
def test_a_loaded_model_does_not_notice_what_becomes_of_its_files(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    model = load_model(make_mixtral(tmp_path / "model"))
    # a page of a mapped file that is cut would kill this process
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    tokens = torch.arange(8)
    before = model.hidden(tokens, tokens, lambda _, query, key, value: query)
    harm(tmp_path / PLACE)
    after = model.hidden(tokens, tokens, lambda _, query, key, value: query)
    assert torch.equal(before, after)
    assert before.abs().max() > 0


@pytest.mark.parametrize(
    "about",
    [
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 70]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": 5, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        [],
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, about: object) -> None:
    header = json.dumps({"a": about}).encode()
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with (
        pytest.raises(CheckpointError),
        Checkpoint(tmp_path, torch.float32) as checkpoint,
    ):
        checkpoint.tensor("a", *(about["shape"] if isinstance(about, dict) else []))


if __name__ == "__main__":
    print(digest(Path(sys.argv[1])).hex())
