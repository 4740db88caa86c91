"""Replaying traces: every format is read alike, lru equals its oracle, the limit is a limit."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kvc2 import errors
from kvc2.commands import cli, replay, traces

FRESH = [(-1, 3), (2, 2), (1, 4), (4, 0), (-1, 2), (8, 1), (2, 3), (10, 2)]  # anchor, fresh blocks


def npz(path: Path) -> Path:
    anchors, fresh = (np.array(each, np.int32) for each in zip(*FRESH, strict=True))
    lengths = [len(each) * 16 + 3 for each in paths()]
    np.savez(path, anchor=anchors, n_new=fresh, input=np.array(lengths, np.int32), block_size=16)
    return path


def paths() -> list[list[int]]:
    made: list[list[int]] = []
    for anchor, fresh in FRESH:
        first = 1 + max((b for each in made for b in each), default=-1)
        head = next((p[: p.index(anchor) + 1] for p in made if anchor in p), [])
        made.append(head + list(range(first, first + fresh)))
    return made


def random_trace(seed: int) -> traces.Trace:
    """Conversations that come back, of which some share a beginning."""
    rng = np.random.default_rng(seed)
    talks: list[list[int]] = [[]]
    asked: list[list[int]] = []
    blocks = 0
    for _ in range(120):
        talk = talks[rng.integers(len(talks))][: int(rng.integers(1, 12))]
        fresh = int(rng.integers(0 if talk else 1, 4))
        talk = talk + list(range(blocks, blocks + fresh))
        blocks += fresh
        talks.append(talk)
        asked.append(talk)
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in asked])])
    ids = np.array([block for each in asked for block in each], np.uint32)
    return traces.Trace("random", 1, ids, offsets, np.diff(offsets), blocks)


def lru_hits(trace: traces.Trace, capacity: int) -> int:
    """The naive oracle: the least recently used of those that nothing resident hangs on."""
    used: dict[tuple[int, ...], int] = {}  # a resident block is its whole path
    hits = 0
    for now in range(len(trace)):
        path = tuple(trace.request(now).tolist())
        prefixes = [path[: n + 1] for n in range(len(path))]
        matched = [each for each in prefixes if each in used]
        hits += len(matched)
        used |= dict.fromkeys(matched, now)
        for block in prefixes[len(matched) :]:
            if len(used) == capacity:
                parents = {each[:-1] for each in used}
                leaves = [p for p in used if p not in parents and used[p] < now]
                if not leaves:
                    break
                del used[min(leaves, key=used.__getitem__)]
            used[block] = now
    return hits


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("capacity", [1, 5, 20, 60])
def test_lru_equals_its_oracle_to_the_last_block(seed: int, capacity: int) -> None:
    trace = random_trace(seed)
    expected = lru_hits(trace, capacity) / len(trace.ids)
    assert replay.hit_rate(trace, capacity, "lru") == expected


@pytest.mark.parametrize("policy", replay.POLICIES)
def test_no_policy_beats_the_limit_and_the_same_seed_decides_the_same(policy: str) -> None:
    trace = random_trace(1)
    for capacity in (5, 20, 60):
        rate = replay.hit_rate(trace, capacity, policy, seed=3)
        assert rate == replay.hit_rate(trace, capacity, policy, seed=3)
        assert 0 < rate <= replay.best_hit_rate(trace, capacity)
    everything = replay.hit_rate(trace, trace.blocks, policy)
    assert everything == replay.best_hit_rate(trace, trace.blocks)


def agents_trace(seed: int, requests: int = 1500) -> traces.Trace:
    """Sixteen sessions at a time; each turn goes on from the whole path before it. One that is
    over is replaced by a new one, so that most bodies are of sessions that nobody goes on with."""
    rng = np.random.default_rng(seed)
    open_sessions: list[list[int]] = [[] for _ in range(16)]
    asked: list[list[int]] = []
    blocks = 0
    for _ in range(requests):
        at = int(rng.integers(16))
        fresh = int(rng.integers(2, 8)) if open_sessions[at] else 20
        path = open_sessions[at] + list(range(blocks, blocks + fresh))
        blocks += fresh
        asked.append(path)
        open_sessions[at] = [] if rng.random() < 0.06 else path
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in asked])])
    ids = np.array([block for each in asked for block in each], np.uint32)
    return traces.Trace("agents", 1, ids, offsets, np.diff(offsets), blocks)


@pytest.mark.parametrize("policy", [each for each in replay.POLICIES if each != "lru"])
@pytest.mark.parametrize("seed", range(3))
def test_what_goes_on_is_kept_from_what_is_over_by_every_policy(policy: str, seed: int) -> None:
    """Where sessions grow turn by turn and end, lru is nearly the best there is: no policy may
    take the bodies of what is over for popular ones."""
    trace = agents_trace(seed)
    capacity = trace.blocks // 5
    lru = replay.hit_rate(trace, capacity, "lru")
    assert replay.hit_rate(trace, capacity, policy) > lru - 0.02


def test_every_format_is_read_alike(tmp_path: Path) -> None:
    expected = paths()
    whole = traces.read(npz(tmp_path / "a.kvt.npz"))
    assert [whole.request(i).tolist() for i in range(len(whole))] == expected
    assert (whole.name, whole.block_tokens, whole.blocks) == ("a", 16, 17)
    rows = [
        {"timestamp": i, "input_length": 16 * len(p) + 3, "hash_ids": [7 + b for b in p] + [99]}
        for i, p in enumerate(expected)
    ]
    bailian = tmp_path / "b.jsonl"
    bailian.write_text("\n".join(json.dumps({**row, "parent_chat_id": -1}) for row in rows))
    read = traces.read(bailian)
    assert [read.request(i).tolist() for i in range(len(read))] == expected
    mooncake = tmp_path / "c.jsonl"
    mooncake.write_text("\n".join(json.dumps({**row, "input_length": 512 * 9}) for row in rows))
    read = traces.read(mooncake)
    assert read.block_tokens == 512
    assert read.input_tokens.tolist() == [512 * 9] * len(expected)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "", "jsonl"),
        ("a.jsonl", '{"timestamp": 1}\n', "hash_ids in line 1"),
        ("a.kvt.npz", "no zip", "kvt file"),
    ],
)
def test_what_is_no_trace_is_refused_by_name(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(errors.InvalidConfig, match=words):
        traces.read(tmp_path / name)


def test_kvc2_replay_prints_what_each_size_brings(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.kvt.npz")
    found = CliRunner().invoke(cli.app, ["replay", str(path), "--capacity", "0.2,1", "--json"])
    assert found.exit_code == 0, found.output
    small, whole = json.loads(found.stdout)
    assert (small["blocks"], whole["blocks"]) == (3, 17)
    assert whole["hit_rate"] == whole["best"] > small["best"] >= small["hit_rate"]
    table = CliRunner().invoke(cli.app, ["replay", str(path), "--policy", "lru"])
    assert table.exit_code == 0
    assert "best possible" in table.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--capacity", "0,1"], "capacity = '0,1'"), (["--plot", "/no/folder/a.png"], "plot")],
)
def test_kvc2_replay_refuses_by_name(tmp_path: Path, arguments: list[str], words: str) -> None:
    path = npz(tmp_path / "a.kvt.npz")
    found = CliRunner().invoke(cli.app, ["replay", str(path), *arguments])
    assert found.exit_code == 2
    assert words in found.output


def test_where_there_is_no_terminal_progress_is_lines_on_stderr(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.kvt.npz")
    asked = ["replay", str(path), "--capacity", "0.2,1"]
    found = CliRunner().invoke(cli.app, asked)
    assert found.stderr.splitlines() == [
        "replayed a, 1 of 2 sizes: 3 blocks",
        "replayed a, 2 of 2 sizes: 17 blocks",
    ]
    assert CliRunner().invoke(cli.app, [*asked, "--json"]).stderr == ""


MOONCAKE = """{"timestamp": 3000, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 0, "input_length": 1024, "output_length": 9, "hash_ids": [0, 7]}
"""
BAILIAN = """{"chat_id": 0, "parent_chat_id": -1, "timestamp": 0.1, "input_length": 33, \
"output_length": 9, "type": "text", "turn": 1, "hash_ids": [5, 6, 7]}
{"chat_id": 1, "parent_chat_id": 0, "timestamp": 0.9, "input_length": 48, \
"output_length": 9, "type": "text", "turn": 2, "hash_ids": [5, 6, 8]}
"""


@pytest.mark.parametrize("compressed", [False, True], ids=["jsonl", "jsonl.zst"])
@pytest.mark.parametrize(
    ("text", "block_tokens", "requests"),
    [(MOONCAKE, 512, [[0, 1], [0, 2]]), (BAILIAN, 16, [[0, 1], [0, 1, 2]])],
    ids=["mooncake", "bailian"],
)
def test_published_lines_are_read_in_order_of_time(
    tmp_path: Path, text: str, block_tokens: int, requests: list[list[int]], compressed: bool
) -> None:
    path = tmp_path / "t.jsonl"
    data = text.replace("\\\n", "").encode()
    if compressed:
        path = tmp_path / "t.jsonl.zst"
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    path.write_bytes(data)
    read = traces.read(path)
    assert (read.name, read.block_tokens) == ("t", block_tokens)
    assert [read.request(i).tolist() for i in range(len(read))] == requests


def test_a_missing_zstandard_is_told_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "t.jsonl.zst").write_bytes(b"")
    with pytest.raises(errors.InvalidConfig, match=r"pip install 'kvc2\[plot\]'"):
        traces.read(tmp_path / "t.jsonl.zst")
