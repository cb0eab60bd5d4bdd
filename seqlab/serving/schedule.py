"""The order of work of a batch of streams: pure bookkeeping, without arrays.

A step of the batch reads at most `budget` tokens. Under the policy "sarathi" (stall-free batching, arXiv
2403.02310, section 4) every decoding stream first gets its token, and what is left of the budget goes to
pieces of prompts, so that long prompts never delay those who are answered.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from seqlab.checks import check_choice, check_positive

POLICIES = ("sarathi", "prefill-first", "decode-first")


@dataclasses.dataclass(eq=False)
class Job:
    """A stream as the schedule sees it.

    Attributes:
      prompt: tokens of its prompt.
      read: those read so far. It decodes once all are read.
      priority: streams of higher priority start first, and displace running ones of lower priority.
      arrival: its place among streams of equal priority, set by the schedule.
      owner: whatever the job stands for.
      answer: the tokens it has drawn, if anyone wants to know them.
    """

    prompt: int
    read: int = 0
    priority: int = 0
    arrival: int = 0
    owner: Any = None
    answer: list[int] = dataclasses.field(default_factory=list)

    @property
    def decoding(self) -> bool:
        """Whether its prompt has been read."""
        return self.read >= self.prompt

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts by priority, then by arrival."""
        return (-self.priority, self.arrival)


class Plan(NamedTuple):
    """The work of a step: streams that are displaced and admitted, those that decode a token, and pieces of
    prompts with their numbers of tokens. A stream whose last piece is read also decodes its first token."""

    displaced: list[Job]
    admitted: list[Job]
    decode: list[Job]
    pieces: list[tuple[Job, int]]

    @property
    def tokens(self) -> int:
        """The tokens that the step reads, first tokens of streams apart."""
        return len(self.decode) + sum(count for _, count in self.pieces)


class Schedule:
    """Waiting and running streams of a batch.

    Args:
      rows: streams that run at once.
      budget: tokens that a step reads at most; decoding streams are never held back by it.
      policy: "sarathi"; "prefill-first" reads all waiting prompts before anyone decodes; "decode-first"
        admits streams only when none is running.
    Raises:
      ValueError: a number below 1, an unknown policy.
    """

    def __init__(self, rows: int, budget: int, policy: str = "sarathi"):
        check_choice(policy, POLICIES, "policy")
        self.rows = check_positive("rows", rows)
        self.budget, self.policy = check_positive("token_budget", budget), policy
        self.waiting: list[Job] = []
        self.running: list[Job] = []  # in the order of admission
        self._arrivals = 0

    def add(self, job: Job) -> Job:
        """Let a stream wait."""
        self._arrivals += 1
        job.arrival = self._arrivals
        self.waiting.append(job)
        return job

    def remove(self, job: Job) -> None:
        """Forget a stream, waiting or running; nothing if it is unknown."""
        for jobs in (self.waiting, self.running):
            if job in jobs:
                jobs.remove(job)

    def plan(self, held_back: Callable[[Job, Iterable[Job]], bool] = lambda job, running: False) -> Plan:
        """The work of the next step; moves streams between waiting and running, and leaves `read` to the
        caller.

        Args:
          held_back: whether a waiting stream should wait on, given those running; others may overtake it.
        """
        self.waiting.sort(key=lambda job: job.rank)
        displaced, admitted = [], []
        decode = [job for job in self.running if job.decoding]
        reading = [job for job in self.running if not job.decoding]
        if self.policy == "prefill-first" and (reading or self._admissible(held_back)):
            decode = []
        left = max(0, self.budget - len(decode))
        pieces = []
        for job in reading:
            count = min(job.prompt - job.read, left)
            if count:
                pieces.append((job, count))
                left -= count
        if self.policy == "decode-first" and self.running:
            return Plan(displaced, admitted, decode, pieces)
        while left and (job := self._next(held_back)) is not None:
            if len(self.running) == self.rows:
                lowest = max(self.running, key=lambda job: job.rank)
                self._displace(lowest)
                displaced.append(lowest)
                decode = [one for one in decode if one is not lowest]
                left += sum(count for one, count in pieces if one is lowest)
                pieces = [piece for piece in pieces if piece[0] is not lowest]
            self.waiting.remove(job)
            self.running.append(job)
            admitted.append(job)
            if count := min(job.prompt - job.read, left):
                pieces.append((job, count))
                left -= count
            elif self.policy != "prefill-first" or not (reading or pieces):
                decode.append(job)  # displaced earlier, or handed over, with its prompt read
                left -= 1
        return Plan(displaced, admitted, decode, pieces)

    def _admissible(self, held_back: Callable[[Job, Iterable[Job]], bool]) -> bool:
        job = self._next(held_back)
        return job is not None and not job.decoding

    def _next(self, held_back: Callable[[Job, Iterable[Job]], bool]) -> Job | None:
        """The waiting stream to admit: one for which there is a row, or a row of lower priority."""
        for job in self.waiting:
            if held_back(job, self.running):
                continue
            if len(self.running) < self.rows or any(one.priority < job.priority for one in self.running):
                return job
            return None
        return None

    def _displace(self, job: Job) -> None:
        self.running.remove(job)
        self.waiting.append(job)
        self.waiting.sort(key=lambda job: job.rank)
