"""Two network namespaces of Linux, which play two hosts, and the link between them, which tests
cut. What runs in one reaches nothing outside but the other; files and unix sockets are shared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

FIRST, SECOND = "10.213.7.1", "10.213.7.2"


@dataclass(frozen=True)
class PlayedHost:
    """`address` on the link, whose end here is `link`."""

    name: str
    address: str
    link: str

    @property
    def enter(self) -> tuple[str, ...]:
        """What begins the command of a process that runs there, which stays the same process."""
        return ("nsenter", f"--net=/run/netns/{self.name}")

    def cut(self) -> None:
        ip("-n", self.name, "link", "set", self.link, "down")

    def join(self) -> None:
        """The link again, or for the first time."""
        ip("-n", self.name, "link", "set", self.link, "up")

    def received_bytes(self) -> int:
        """Over the link, so far."""
        told = json.loads(ip("-n", self.name, "-s", "-j", "link", "show", self.link))
        return int(told[0]["stats64"]["rx"]["bytes"])


@contextmanager
def two_hosts() -> Iterator[tuple[PlayedHost, PlayedHost]]:
    """Joined. Skips, and says why, where there may be none."""
    if missing := [each for each in ("ip", "nsenter") if shutil.which(each) is None]:
        pytest.skip(f"no {' and no '.join(missing)} here (iproute2, util-linux)")
    number = os.getpid()
    hosts = tuple(
        PlayedHost(f"kvc2-{number}-{letter}", address, f"kvc2{letter}{number % 1_000_000}")
        for letter, address in (("a", FIRST), ("b", SECOND))
    )
    a, b = hosts
    with ExitStack() as stack:
        try:
            for each in hosts:
                ip("netns", "add", each.name)
                stack.callback(ip, "netns", "del", each.name)
            ends = ("peer", "name", b.link, "netns", b.name)
            ip("link", "add", a.link, "netns", a.name, "type", "veth", *ends)
            for each in hosts:
                ip("-n", each.name, "link", "set", "lo", "up")  # also for what is its own address
                ip("-n", each.name, "addr", "add", f"{each.address}/24", "dev", each.link)
                each.join()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield a, b


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout
