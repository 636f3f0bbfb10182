"""Judges replies against typed answers, for rewards.

What an answer may be, and how the final answer is taken out of a reply, is decided in one place for training and
evaluation, `mindjax.data.tasks.verify`; here it becomes a number, and what was not judged in full is counted.
"""

from __future__ import annotations

from typing import Any

from mindjax.data.tasks import verify
from mindjax.data.tasks.worker import Worker

# A reply longer than this is no answer to anything we ask; what it costs to look at one stays bounded.
MAX_CHARACTERS = 100_000


class Verifier:
    """Judges replies one by one; holds a process once one needs it, see `mindjax.data.tasks.worker`."""

    def __init__(self, timeout: float = 3.0) -> None:
        """
        Args:
          timeout: seconds of processor time for mathematics, or a pattern, in one reply.
        """
        self._worker = Worker(timeout)
        self._too_long = 0
        self._told: dict[str, float] = {}

    def __call__(self, reply: str, answer: dict[str, Any] | None) -> float:
        """1.0 for a right reply, 0.0 for a wrong one.

        Raises:
          ValueError: the sample has no answer, or one that `verify.is_right` refuses.
        """
        if answer is None:
            raise ValueError(
                "this sample has no answer to verify a reply against; leave it out, or reward something else"
            )
        return float(self._looks(reply) and verify.is_right(answer, reply, self._worker.maths))

    def form(self, reply: str, pattern: str) -> float:
        """1.0 where all of the reply matches `pattern`, or where it has a closed `\\boxed{}` if that is empty."""
        if not self._looks(reply):
            return 0.0
        return float(self._worker.matches(pattern, reply) if pattern else verify.final(reply)[1])

    def overlap(self, reply: str, answer: dict[str, Any] | None) -> float:
        """Intersection over union of the reply's box and that of an answer of kind "box"; 0.0 for other answers."""
        if answer is None or answer["kind"] != "box" or not self._looks(reply):
            return 0.0
        return verify.overlap(answer, reply)

    def counters(self) -> dict[str, float]:
        """Replies that scored 0 unjudged since the last call, so that a resumed run counts as one that never stopped.

        "verifier_timeouts" took too long to judge, "verifier_failures" took all memory or stack or ended the process,
        "verifier_too_long" have more characters than any answer.
        """
        worker = self._worker.counts
        counts = {
            "verifier_timeouts": float(worker["timeouts"]),
            "verifier_failures": float(worker["failures"]),
            "verifier_too_long": float(worker["too_long"] + self._too_long),
        }
        since, self._told = {name: count - self._told.get(name, 0.0) for name, count in counts.items()}, counts
        return since

    def close(self) -> None:
        """Ends the process; a later reply starts another."""
        self._worker.close()

    def _looks(self, reply: str) -> bool:
        self._too_long += len(reply) > MAX_CHARACTERS
        return len(reply) <= MAX_CHARACTERS
