"""Bugs of what calls CUDA for the daemon, each as an edit of one file: tests/crash/planted.py
plants them one by one, and the laws of laws/ must see each."""

from __future__ import annotations

from tests.crash.bugs import Bug, bug

HOUSE = "kvc2/cuda/"
MOVER, ROWS, MEMORY = HOUSE + "mover.py", HOUSE + "rows.py", HOUSE + "memory.py"
DRIVER, WORKER, WORKERS = HOUSE + "driver.py", HOUSE + "worker.py", HOUSE + "workers.py"
NURSERY, MESSAGES = HOUSE + "nursery.py", HOUSE + "messages.py"
DEVICE, EXECUTORS, ARENA = "kvc2/tiers/device.py", "kvc2/tiers/executors.py", "kvc2/arena.py"
LAWS = "tests/cuda/test_laws.py::"
COPIES = (
    ("tests/cuda/test_rows.py",),
    (LAWS + "test_copies_obey_their_laws",),
    (LAWS + "test_faults_and_mistakes_are_seen_and_leave_nothing",),
)
WORKING = ((LAWS + "test_workers_meet_the_executors_contract_and_survive_every_death",),)

OF_COPIES = (
    bug(
        "a read doesn't wait",
        MOVER,
        "            ask(cu.cuStreamSynchronize, self._stream)\n        except BaseException:",
        "            pass\n        except BaseException:",
    ),
    bug(
        "a write doesn't wait for its layers",
        MOVER,
        "                ask(cu.cuEventSynchronize, self._event(number))\n",
        "",
    ),
    bug(
        "a layer is told before it is there",
        MOVER,
        "                ask(cu.cuEventSynchronize, self._event(number))\n"
        "                if tell is not None:\n"
        "                    tell(group.layers_done)\n",
        "                if tell is not None:\n"
        "                    tell(group.layers_done)\n"
        "                ask(cu.cuEventSynchronize, self._event(number))\n",
    ),
    bug(
        "an event is recorded before its copies",
        MOVER,
        "                self._queue(pool, group, pages, payloads, to_pool=True)\n"
        "                ask(cu.cuEventRecord, self._event(number), self._stream)\n",
        "                ask(cu.cuEventRecord, self._event(number), self._stream)\n"
        "                self._queue(pool, group, pages, payloads, to_pool=True)\n",
    ),
    bug(
        "all groups wait for one event",
        MOVER,
        "                ask(cu.cuEventSynchronize, self._event(number))\n",
        "                ask(cu.cuEventSynchronize, self._event(0))\n",
    ),
    bug(
        "a copy that failed leaves others under way",
        MOVER,
        "        with suppress(CudaFault):  # what failed first is raised\n"
        "            ask(cu.cuStreamSynchronize, self._stream)\n",
        "        with suppress(CudaFault):\n            pass\n",
    ),
    bug(
        "the pitch is the other side's",
        MOVER,
        "            copy.srcPitch, copy.dstPitch = rows.width, rows.pitch\n",
        "            copy.srcPitch, copy.dstPitch = rows.pitch, rows.width\n",
    ),
    bug(
        "pages lie as far apart as rows",
        MOVER,
        "places = (pages.astype(np.int64) * rows.stride).tolist()",
        "places = (pages.astype(np.int64) * rows.pitch).tolist()",
    ),
    bug(
        "a copy may lie in two registrations",
        MOVER,
        "                if not several:\n",
        "                if not several or several:\n",
    ),
    bug(
        "what is cut stays so for the next page",
        MOVER,
        "                self._shape(rows, to_pool)\n\n",
        "\n",
    ),
    bug(
        "a page outside of the pool is copied",
        MOVER,
        "                if end > pool.memory.num_bytes:\n",
        "                if end < 0:\n",
    ),
    bug(
        "layers are told one too early",
        ROWS,
        "        found.append(Group(tuple(_stacked(_joined(lines), max_pitch)), done))\n",
        "        found.append(Group(tuple(_stacked(_joined(lines), max_pitch)), done + 1))\n",
    ),
    bug(
        "rows of two pages are joined",
        ROWS,
        "    return beside and before.width + line.width <= line.stride\n",
        "    return beside\n",
    ),
    bug(
        "a pitch may be beyond the device's",
        ROWS,
        "        if alike and even and line.width <= pitch <= max_pitch:\n",
        "        if alike and even and line.width <= pitch:\n",
    ),
    bug(
        "rows at uneven distances are one copy",
        ROWS,
        "        even = stack.height == 1 or pitch == stack.pitch\n",
        "        even = True\n",
    ),
    bug(
        "a row that crosses a border is copied in one",
        ROWS,
        "            width = min(rows.width - done, piece - (at + done) % piece)\n",
        "            width = rows.width - done\n",
    ),
    bug(
        "the device can't write to the arena",
        MEMORY,
        "ask(cu.cuMemHostRegister, self.address + begin, length, 0)",
        "ask(cu.cuMemHostRegister, self.address + begin, length, cu.CU_MEMHOSTREGISTER_READ_ONLY)",
    ),
    bug(
        "a piece is registered at each use",
        MEMORY,
        "                self._there[number] = True\n",
        "",
    ),
    bug(
        "a registration goes on behind the arena",
        MEMORY,
        "                length = min(self.piece, self._memory.size - begin)\n",
        "                length = self.piece\n",
    ),
    bug(
        "nobody may access what is mapped",
        MEMORY,
        "            ask(cu.cuMemSetAccess, self.address, self._size, [access], 1)\n",
        "            pass\n",
    ),
    bug(
        "a handle is never released",
        MEMORY,
        "        finally:\n            ask(cu.cuMemRelease, handle)\n",
        "        finally:\n            pass\n",
    ),
    bug(
        "a map that failed keeps its addresses",
        MEMORY,
        "                ask(cu.cuMemAddressFree, self.address, self._size)\n"
        "                raise\n",
        "                raise\n",
    ),
    bug(
        "a pool that was not made keeps its descriptor",
        MEMORY,
        "            os.close(self.fd)\n            raise\n",
        "            raise\n",
    ),
    bug(
        "an allocation is not of whole units",
        MEMORY,
        "    return -(-num_bytes // unit) * unit\n",
        "    return num_bytes\n",
    ),
    bug(
        "copies are on the default stream",
        DRIVER,
        "return ask(cu.cuStreamCreateWithPriority, cu.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)",
        "return cu.CUstream(0)",
    ),
    bug(
        "a context is not made current",
        DRIVER,
        "        ask(cu.cuCtxSetCurrent, self._context)\n",
        "        pass\n",
    ),
)

OF_WORKERS = (
    bug(
        "a thread of a worker has no context",
        WORKER,
        "        self._gpu.use()\n        return Mover",
        "        return Mover",
    ),
    bug(
        "progress has no sequence",
        WORKER,
        "            pool.progress.tell(base + layers)\n",
        "            pool.progress.tell(layers)\n",
    ),
    bug(
        "a transfer without a sequence is told",
        WORKER,
        "tell if base else None)",
        "tell)",
    ),
    bug(
        "nobody is woken",
        WORKER,
        "        os.eventfd_write(self._event_fd, 1)\n",
        "",
    ),
    bug(
        "a poisoned worker goes on",
        WORKER,
        "            return (Outcome.LOST if fault.sticky else Outcome.REFUSED), str(fault)\n",
        "            return Outcome.REFUSED, str(fault)\n",
    ),
    bug(
        "any fault ends a worker",
        WORKER,
        "            return (Outcome.LOST if fault.sticky else Outcome.REFUSED), str(fault)\n",
        "            return Outcome.LOST, str(fault)\n",
    ),
    bug(
        "a closed pool stays mapped",
        WORKER,
        "            gone.pages.memory.close()\n",
        "",
    ),
    bug(
        "a closed pool keeps its eventfd",
        WORKER,
        "            gone.progress.close()\n",
        "",
    ),
    bug(
        "descriptors of a call stay open",
        MESSAGES,
        "        for fd in self.fds:\n            os.close(fd)\n        self.fds = []\n",
        "        self.fds = []\n",
    ),
    bug(
        "a call has no deadline",
        MESSAGES,
        "        left = None if deadline is None else deadline - time.monotonic()\n",
        "        left = None\n",
    ),
    bug(
        "a late worker lives on",
        WORKERS,
        "        if outcome is Outcome.LOST:\n            self.kill()\n",
        "        if outcome is Outcome.LOST:\n",
    ),
    bug(
        "promotions wait behind the opening of pools",
        WORKERS,
        "            What.WRITE: promoting,\n            What.READ: demoting,\n",
        "            What.WRITE: pools,\n            What.READ: pools,\n",
    ),
    bug(
        "a dead worker is asked again",
        WORKERS,
        "            if there is not None and not there.dead:\n",
        "            if there is not None:\n",
    ),
    bug(
        "a pool is not opened in the next worker",
        DEVICE,
        "            if self._worker is None or self._worker.dead:\n",
        "            if self._worker is None:\n",
    ),
    bug(
        "a worker that doesn't let go may",
        DEVICE,
        "            worker.kill()  # which lets go of it\n",
        "            pass\n",
    ),
    bug(
        "sessions are not told that their worker died",
        EXECUTORS,
        "            lost()\n",
        "            pass\n",
    ),
    bug(
        "a nursery and its workers outlive the daemon",
        NURSERY,
        "        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)\n",
        "",
    ),
    bug(
        "the driver is asked in the nursery itself",
        NURSERY,
        "    if os.fork() == 0:\n        channel.close()\n        _run(_probe, me, telling)\n"
        "    os.close(telling)\n",
        "    _probe(telling)\n",
    ),
    bug(
        "the arena is sealed before the nursery has it",
        ARENA,
        "    before_seal(fd, capacity_bytes)\n    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)\n",
        "    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)\n    before_seal(fd, capacity_bytes)\n",
    ),
)

CUDA_BUGS: tuple[Bug, ...] = (
    *(Bug(each.name, each.file, each.edits, COPIES) for each in OF_COPIES),
    *(Bug(each.name, each.file, each.edits, WORKING) for each in OF_WORKERS),
)
TESTS = (*COPIES, *WORKING)
