"""A cache under writers that are killed at random, while it is read: no promised sample is lost, none is wrong.

    soak.py DIRECTORY [--seconds 3600] [--rounds N] [--seed N]

A round is a new cache. Processes write samples of it, in either tier, commit now and then, and log what ``commit`` or
``close`` returned for; they are killed at random, again and again, and others go on, while this process reads: whole
samples, ranges and packed ones, by readers of every age. Then the cache is repaired, verified, merged into another one
and read once more. Every value that was read is held against the same sample of a cache that one writer wrote in
peace, bit by bit. Prints what was done, and how much memory this process had for itself as the rounds went by. What is
wrong is an error; from forty rounds on so is memory that grows.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from kdfast import PackedTargets, SparseTargets, cache, soft_targets

V, SAMPLES, WRITERS, KILLS = 700, 240, 3, 12
TEMPERATURES = (1.0, 2.0)
FIELDS = ("ids", "logprobs", "k_eff")


@dataclasses.dataclass
class Done:
    """What a run did."""

    rounds: int = 0
    kills: int = 0
    promised: int = 0  # samples
    read: int = 0  # samples or ranges of them, each held against what was written
    saved: int = 0  # samples that a repair copied
    overtaken: int = 0  # readers from before a repair that were told so of a sample
    memory: list[int] = dataclasses.field(default_factory=list)  # private bytes after each round

    @property
    def growth(self) -> float:
        """Bytes more in the last quarter of the rounds than in the second."""
        quarter = max(1, len(self.memory) // 4)
        return statistics.median(self.memory[-quarter:]) - statistics.median(self.memory[quarter : 2 * quarter])


def private_bytes() -> int:
    """Memory that no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def targets_of(number: int) -> tuple[SparseTargets, torch.Tensor]:
    """A sample and its token ids, always the same."""
    generator = torch.Generator().manual_seed(number)
    tokens = 1 + number * 37 % 300
    logits = 3 * torch.randn(tokens, V, generator=generator)
    method = {"method": "topp", "p": 0.9} if number % 3 == 0 else {}
    return soft_targets(logits, k=16, temperatures=TEMPERATURES, **method), torch.arange(tokens) + number


def write_until_done(path: Path, log: Path, given: dict[int, tuple[SparseTargets, torch.Tensor]], seed: int) -> None:
    """Writes what is missing, in any order, with writers that may end without a word; for a process of its own."""
    rng = random.Random(seed)
    with log.open("ab", buffering=0) as promises:
        while True:
            writer = cache.Writer(
                path,
                vocab_size=V,
                temperatures=TEMPERATURES,
                tier=rng.choice(["fixed", "compact"]),
                shard_bytes=rng.choice([20_000, 200_000]),
                threads=1,
            )
            todo = writer.missing(given)
            if not todo:
                writer.close()
                return
            waiting: list[int] = []
            for number in rng.sample(todo, min(len(todo), rng.randrange(1, 60))):
                writer.write(number, *given[number])
                waiting.append(number)
                if rng.random() < 0.1:
                    writer.commit()
                    promises.write(b"".join(b"%d\n" % n for n in waiting))
                    waiting.clear()
            if rng.random() < 0.8:
                writer.close()
                promises.write(b"".join(b"%d\n" % n for n in waiting))
            del writer


class Round:
    """One cache, from its first writer to its merged copy."""

    def __init__(self, folder: Path, expected: cache.Reader, given: dict, rng: random.Random, done: Done) -> None:
        self.path, self.log, self.merged = folder / "c", folder / "promised", folder / "merged"
        self.folder, self.expected, self.given, self.rng, self.done = folder, expected, given, rng, done
        self.children: list[int] = []
        self.readers: list[cache.Reader] = []

    def run(self, *, to_the_end: bool) -> None:
        """Everything, and nothing is left; ``to_the_end``: the last writers are not killed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.log.touch()
        try:
            for _ in range(WRITERS):
                self.start()
            for _ in range(KILLS):
                time.sleep(self.rng.random() * 0.2)
                self.look()
                self.kill(self.rng.randrange(len(self.children)))
                self.start()
            if to_the_end:
                self.wait()
            self.look()
        finally:
            while self.children:
                self.kill(0)
        self.settle()
        self.readers.clear()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """A process that writes."""
        seed = self.rng.randrange(1 << 30)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                write_until_done(self.path, self.log, self.given, seed)
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)  # what it has of its parent is its parent's
        self.children.append(child)

    def kill(self, which: int) -> None:
        """One of them, wherever it is."""
        child = self.children.pop(which)
        os.kill(child, signal.SIGKILL)
        self.ended(child)
        self.done.kills += 1

    def wait(self) -> None:
        """Until all is written."""
        while self.children:
            self.ended(self.children.pop())

    def ended(self, child: int) -> None:
        _, status = os.waitpid(child, 0)
        how = os.waitstatus_to_exitcode(status)
        if how not in (0, -signal.SIGKILL):
            msg = f"a writer ended with {how}"
            raise AssertionError(msg)

    def promised(self) -> list[int]:
        """What is durable; a line that was cut is not told of."""
        return sorted({int(line) for line in self.log.read_bytes().rpartition(b"\n")[0].split()})

    def look(self) -> None:
        """Reads by a new reader, or an old one: what was promised before it was opened, and what else it has."""
        durable = self.promised()
        if not durable:
            return
        if self.readers and self.rng.random() < 0.4:
            self.check(self.rng.choice(self.readers))
            return
        reader = cache.Reader(self.path)
        self.check(reader, durable)
        self.readers = [*self.readers[-3:], reader]

    def check(self, reader: cache.Reader, durable: list[int] | None = None) -> None:
        """All that must be there, and some of what is, in any of the ways to read it."""
        there = set(reader)
        lost = [number for number in durable or [] if str(number) not in there]
        if lost:
            msg = f"samples {lost} were promised and are gone"
            raise AssertionError(msg)
        some = self.rng.sample(sorted(there), min(len(there), 40))
        wanted = [self.rng.choice([key, (key, self.part(key))]) for key in some]
        read = reader.read
        if self.rng.random() < 0.3:
            wanted = [w for w in wanted if reader.describe(w if isinstance(w, str) else w[0]).tier == "fixed"]
            read = reader.packed
        for key, got, is_ in zip(wanted, read(wanted), self.expected.read(wanted), strict=True):
            same(key, got, is_)
        self.done.read += len(wanted)

    def part(self, key: str) -> slice:
        start = self.rng.randrange(len(self.given[int(key)][1]))
        return slice(start, start + self.rng.randrange(200))

    def settle(self) -> None:
        """After the last writer: repaired, verified, merged, read."""
        if not self.log.stat().st_size:
            return
        durable = self.promised()
        self.done.promised += len(durable)
        repair = cache.repair(self.path)
        self.done.saved += repair.kept
        if repair.lost or repair.in_use:
            msg = f"a repair lost {repair.lost}, and found {repair.in_use} in use"
            raise AssertionError(msg)
        cache.merge([self.path], self.merged)
        for path in (self.path, self.merged):
            if faults := cache.verify(path).faults:
                msg = f"{path.name}: {faults}"
                raise AssertionError(msg)
            reader = cache.Reader(path)
            self.check(reader, durable)
            keys = list(reader)
            tokens = [self.given[int(key)][1] for key in keys]
            for key, got, is_ in zip(keys, reader.read(keys, tokens), self.expected.read(keys), strict=True):
                same(key, got, is_)
            self.done.read += len(keys)
        for reader in self.readers:
            try:
                self.check(reader)
            except cache.CacheError as error:
                # Two writers wrote a sample of this key, and the repair left the one that this reader does not know.
                if error.code != "missing" or "its key has another" not in str(error):
                    raise
                self.done.overtaken += 1


def same(key: object, got: SparseTargets | PackedTargets, expected: SparseTargets) -> None:
    """The same bits."""
    if isinstance(got, PackedTargets):
        got = got.unpack()
    pairs = [(getattr(got, name), getattr(expected, name)) for name in FIELDS]
    pairs += [(got.lse[t], expected.lse[t]) for t in TEMPERATURES]
    for a, b in pairs:
        if (a is None) != (b is None) or not (a is None or torch.equal(a, b)):
            msg = f"sample {key} is not what was written"
            raise AssertionError(msg)


def rounds(folder: Path, seed: int) -> Iterator[Done]:
    """What was done so far, after every round."""
    torch.set_num_threads(1)
    rng, done = random.Random(seed), Done()
    given = {number: targets_of(number) for number in range(SAMPLES)}
    with cache.Writer(folder / "expected", vocab_size=V, temperatures=TEMPERATURES) as writer:
        for number, (targets, tokens) in given.items():
            writer.write(number, targets, tokens)
    expected = cache.Reader(folder / "expected")
    while True:
        to_the_end = done.rounds == 0 or rng.random() < 0.5
        Round(folder / f"round {done.rounds}", expected, given, rng, done).run(to_the_end=to_the_end)
        done.rounds += 1
        done.memory.append(private_bytes())
        yield done


def main() -> int:
    """1 where memory grew; what was wrong is an error."""
    parser = argparse.ArgumentParser(prog="soak.py", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=3600, help="after which no round begins; default: 3600")
    parser.add_argument("--rounds", type=int, default=1 << 30, help="at most")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    begun = time.monotonic()
    for done in rounds(options.directory, options.seed):
        if time.monotonic() - begun > options.seconds or done.rounds == options.rounds:
            break
    print(
        f"{done.rounds} rounds in {time.monotonic() - begun:.0f} s: {done.kills} writers killed, "
        f"{done.promised} samples promised, {done.saved} saved by repairs, {done.read} reads, none wrong, "
        f"{done.overtaken} readers overtaken by a repair; private memory "
        f"{done.memory[len(done.memory) // 4] >> 20} MiB after a quarter, {done.memory[-1] >> 20} MiB at the end"
    )
    return int(done.rounds >= 40 and done.growth > 16 << 20)


if __name__ == "__main__":
    sys.exit(main())
