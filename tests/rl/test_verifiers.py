"""The verifier of rewards: mathematics, hostile replies, and the process that judges them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.data.tasks import worker
from mindjax.data.tasks.worker import MAX_EXPRESSION, START_SECONDS, WALL, Worker
from mindjax.rl.verifiers import MAX_CHARACTERS, Verifier

TIMEOUT = 0.5  # seconds of processor time
# By the clock: one question, and the start of the process that replaces a killed one.
BOUND = WALL * TIMEOUT + START_SECONDS


def maths(value: str, **more: Any) -> dict[str, Any]:
    return {"kind": "maths", "value": value, **more}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    verifier = Verifier()
    yield verifier
    verifier.close()


@pytest.fixture(scope="module")
def impatient() -> Iterator[Verifier]:
    verifier = Verifier(TIMEOUT)
    yield verifier
    verifier.close()


# (right answer, reply, whether it is right)
MATHS = [
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", r"so it is \boxed{\frac{2}{4}}.", True),
    (r"\frac{1}{2}", r"\frac12", True),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", False),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}", False),
    ("x^2+2x+1", "(x+1)^2", True),
    ("x^2+2x+1", "(x+1)^3", False),
    (r"\sqrt{8}", r"$2\sqrt{2}$", True),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}", True),
    ("(1, 2)", "(2, 1)", False),
    ("x>1", r"(1,\infty)", True),
    (r"(1,\infty)", "x>1", False),  # an answer may leave the variable out, not bring one in
    (r"50\%", "0.5", True),
    ("7", "007", True),
    ("5", "\uff15", True),  # full-width
    ("5", "答案是 $5$。", True),
    ("5", "the answer is 5", False),  # neither boxed, nor between dollars, nor alone
    ("5", "$5$ or $6$", False),
    ("5", "5 or 6", False),
    ("blue", r"\boxed{blue}", True),  # no mathematics, and math-verify on its own says no
    ("blue", r"\boxed{\text{blue}}", True),
    ("blue", r"\boxed{blue. }", True),
    ("blue", r"\boxed{red}", False),
    ("5", "", False),
    ("5", "\\", False),
    ("5", r"\boxed{}", False),
]


@pytest.mark.parametrize(("value", "reply", "right"), MATHS)
def test_mathematics(verifier: Verifier, value: str, reply: str, right: bool) -> None:
    assert verifier(reply, maths(value)) == float(right)


def test_boxed_mathematics_needs_its_box(verifier: Verifier) -> None:
    assert verifier("0.5", maths(r"\frac{1}{2}", boxed=True)) == 0
    assert verifier(r"\boxed{0.5}", maths(r"\frac{1}{2}", boxed=True)) == 1


def test_math_verify_on_its_own_agrees_or_has_its_known_fault(verifier: Verifier) -> None:
    """Called here, on the main thread and with its own timeouts."""
    from math_verify import LatexExtractionConfig, parse, verify

    def direct(value: str, reply: str) -> bool:
        gold, said = (parse(f"${text}$", [LatexExtractionConfig()]) for text in (value, reply))
        return bool(verify(gold, said))

    pairs = [(value, reply, right) for value, reply, right in MATHS if "$" not in reply and "boxed" not in reply]
    expressions = ["3x", r"\pi", "3.1416", "1,000", "10^3", "[0, 1]"]
    pairs += [(a, b, a == b or {a, b} == {"1,000", "10^3"}) for a in expressions for b in expressions]
    for value, reply, right in pairs:
        if reply not in ("", "\\", "\uff15"):
            assert direct(value, reply) == right == bool(verifier(reply, maths(value))), (value, reply)
    assert not verify(parse("blue"), parse(r"\boxed{blue}"))


@settings(max_examples=25, deadline=None)
@given(
    a=st.fractions(-99, 99, max_denominator=50), b=st.fractions(-99, 99, max_denominator=50), scale=st.integers(1, 9)
)
def test_fractions_are_compared_by_value(a: Fraction, b: Fraction, scale: int) -> None:
    with_scale = rf"\frac{{{b.numerator * scale}}}{{{b.denominator * scale}}}"
    assert _SHARED(rf"\boxed{{{with_scale}}}", maths(f"{a.numerator}/{a.denominator}")) == float(a == b)
    assert _SHARED(with_scale, maths(f"{b.numerator}/{b.denominator}")) == 1


_SHARED = Verifier()  # hypothesis does not take a fixture


@pytest.fixture(scope="module", autouse=True)
def _close_shared() -> Iterator[None]:
    yield
    _SHARED.close()


def test_it_judges_on_any_thread(verifier: Verifier) -> None:
    """math-verify itself raises there."""
    verdicts: list[float] = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append(verifier(f"{n}/2", maths(rf"\frac{{{n}}}{{2}}"))))
        for n in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert verdicts == [1.0] * 4


TIMED_OUT = [
    "9^{9^{9^{9}}}",
    r"\sum_{n=1}^{10^{12}} \frac{1}{n^2 + \sin n}",
    "(" * 900 + "1" + ")" * 900,
]
WRONG = [
    *TIMED_OUT,
    "9^9^9^9",
    "9**9**9**9",
    r"\boxed{9^{9^9}}",
    "100000000!",
    r"\sqrt{" * 200 + "2" + "}" * 200,
    "{" * 1000 + "1" + "}" * 1000,
    r"\boxed{" * 250,
    "\\frac" * 300,
    "$" * 1999,
    "answer " * 250,
    "__import__('os').system('touch planted')",
    r"\input{/etc/passwd} \write18{touch planted}",
    "lambda: (yield)",
    "\x00\n\r\u2028\ud800",
    "1" * 1999,
]


@pytest.mark.parametrize("reply", WRONG, ids=lambda reply: repr(reply[:12]))
def test_a_hostile_reply_is_wrong_within_its_timeout(
    impatient: Verifier, reply: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    impatient.counters()
    began = time.monotonic()
    assert impatient(reply, maths("12")) == 0
    assert time.monotonic() - began < BOUND
    if reply in TIMED_OUT:
        assert impatient.counters()["verifier_timeouts"] == 1
    assert impatient(r"\frac{24}{2}", maths("12")) == 1  # and the next one is judged
    assert not list(tmp_path.iterdir())


def test_ten_megabytes_are_not_looked_at(impatient: Verifier) -> None:
    answers: list[dict[str, Any]] = [
        maths("5"),
        {"kind": "int", "value": 5},
        {"kind": "exact", "value": "5"},
        {"kind": "box", "value": [0, 0, 5, 5]},
    ]
    impatient.counters()
    seconds = time.process_time()
    for answer in answers:
        assert impatient("5" + " " * 10_000_000, answer) == 0
        assert impatient(r"\boxed{5}" + "{" * 10_000_000, answer) == 0
    assert impatient.form(r"\boxed{5}" + "a" * 10_000_000, "") == impatient.form("a" * 10_000_000, "a*") == 0
    assert impatient.overlap("[0, 0, 5, 5]" + " " * 10_000_000, answers[-1]) == 0
    assert impatient.counters()["verifier_too_long"] == 11
    assert time.process_time() - seconds < 1  # 100 MB of text were made meanwhile
    assert impatient("5" + " " * (MAX_CHARACTERS - 1), answers[1]) == 1
    assert impatient("0" * MAX_EXPRESSION, maths("0")) == 1
    assert impatient("0" * (MAX_EXPRESSION + 1), maths("0")) == 0  # no page of mathematics either
    assert impatient.counters()["verifier_too_long"] == 1


@pytest.mark.parametrize(
    "answer",
    [
        {"kind": "exact", "value": "5"},
        {"kind": "one_of", "value": ["5"]},
        {"kind": "within", "value": 5, "tolerance": 1},
        {"kind": "string", "value": "x"},
        {"kind": "int", "value": 5},
        {"kind": "float", "value": 5.0},
        {"kind": "choice", "value": "A", "options": ["x", "y"]},
        {"kind": "yes_no", "value": True},
        {"kind": "set", "value": [1, 2], "of": "int"},
        {"kind": "set", "value": ["a", "b"]},
        {"kind": "box", "value": [0, 0, 5, 5]},
    ],
    ids=lambda answer: answer["kind"],
)
def test_long_replies_of_other_kinds_need_no_process(impatient: Verifier, answer: dict[str, Any]) -> None:
    """Of what makes careless patterns go back and forth: a quadratic one would take seconds for each reply."""
    n = 30_000
    pid = impatient._worker.pid
    for unit in "0|9| |1,|1,000|(|[1|{|}|\\boxed{|\\text{|$|a |. |是|和|-|é".split("|"):
        for text in ((unit * n)[:n], "1" + (unit * n)[:n] + "x", "[" + (unit * n)[:n]):
            assert impatient(text, answer) == 0
    assert impatient._worker.pid == pid


def test_a_killed_worker_is_replaced() -> None:
    with Worker(TIMEOUT) as judge:
        assert judge.pid is None  # nothing was asked
        assert judge.maths("0.5", "1/2")
        first = judge.pid
        assert first is not None
        assert judge.maths("0.5", "2/4") and judge.pid == first  # reused
        assert not judge.maths("0.5", "9^{9^{9^{9}}}")
        second = judge.pid
        assert second not in (None, first) and judge.counts == {"timeouts": 1}
        assert judge.maths("0.5", "3/6") and judge.pid == second
        # Somebody else ends it while it idles: the next question is not to blame.
        assert second is not None
        os.kill(second, signal.SIGKILL)
        assert judge.maths("0.5", "4/8") and judge.pid not in (None, second)
        assert judge.counts == {"timeouts": 1}
        last = judge.pid
    assert judge.pid is None and last is not None
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)
    assert judge.maths("0.5", "5/10")  # closing is not for good
    judge.close()
    judge.close()


def test_a_worker_killed_in_the_middle_of_a_question_is_asked_again() -> None:
    with Worker(0.8) as judge:
        assert judge.maths("0.5", "1/2")
        first = judge.pid
        assert first is not None
        killer = threading.Timer(0.1, os.kill, (first, signal.SIGKILL))
        killer.start()
        assert not judge.matches("(a|a)*b", "a" * 50_000)  # the second process times out
        assert judge.pid != first and judge.counts == {"timeouts": 1}


def test_a_question_that_ends_its_process_twice_is_answered_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the machine has no memory left."""
    with Worker() as judge:
        asked: list[str] = []

        def exchange(process: Any, question: str, seconds: float) -> dict[str, Any]:
            if question:
                asked.append(question)
                process.kill()
            return original(process, question, seconds)

        original = judge._exchange
        monkeypatch.setattr(judge, "_exchange", exchange)
        assert not judge.maths("0.5", "1/2")
        assert len(asked) == 2 and judge.counts == {"failures": 1}


def test_the_process_writes_no_file_and_takes_no_more_than_its_memory() -> None:
    with Worker(memory=1 << 29) as judge:
        assert judge.maths("0.5", "1/2")
        limits = Path(f"/proc/{judge.pid}/limits").read_text().splitlines()
    found = {line[:26].strip(): line[26:].split()[:2] for line in limits}
    assert found["Max file size"] == found["Max core file size"] == ["0", "0"]
    assert found["Max address space"] == [str(1 << 29)] * 2


def test_memory_is_bounded() -> None:
    with Worker(20.0, memory=1 << 27) as judge:
        assert judge.matches("a*", "a" * 1000)
        assert not judge.matches("a*", "a" * 60_000_000)
        assert judge.counts == {"failures": 1}
        assert judge.maths("0.5", "1/2")


def test_what_is_no_pattern_is_counted_as_a_failure() -> None:
    verifier = Verifier()
    assert verifier.form("a", "(") == 0
    assert verifier.counters() == {"verifier_timeouts": 0, "verifier_failures": 1, "verifier_too_long": 0}
    verifier.close()


def test_a_pattern_that_goes_back_and_forth_costs_its_timeout() -> None:
    verifier = Verifier(TIMEOUT)
    began = time.monotonic()
    assert verifier.form("a" * 50_000, "(a|a)*b") == 0
    assert verifier.counters() == {"verifier_timeouts": 1, "verifier_failures": 0, "verifier_too_long": 0}
    assert time.monotonic() - began < BOUND
    assert verifier.form("a\nb", "a.b") == 1
    assert verifier.form("ab", "a") == verifier.form("ba", "a") == 0  # all of the reply has to match
    verifier.close()


def test_a_worker_waits_by_the_clock_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that hangs without computing is killed as well."""
    with Worker(TIMEOUT) as judge:
        assert judge.maths("0.5", "1/2")
        assert judge.pid is not None
        os.kill(judge.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert not judge.maths("0.5", "2/4")
        assert WALL * TIMEOUT <= time.monotonic() - began < BOUND
        assert judge.counts == {"timeouts": 1}


def test_a_timeout_is_not_remembered_and_a_verdict_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker() as judge:
        asked: list[str] = []

        def exchange(process: Any, question: str, seconds: float) -> dict[str, Any]:
            if question:
                asked.append(question)
                if len(asked) == 1:
                    raise TimeoutError
            return original(process, question, seconds)

        original = judge._exchange
        monkeypatch.setattr(judge, "_exchange", exchange)
        assert [judge.maths("0.5", "1/2") for _ in range(4)] == [False, True, True, True]
        assert len(asked) == 2


def test_the_process_knows_nothing_of_jax() -> None:
    with Worker() as judge:
        assert judge.maths("0.5", "1/2")
        mapped = Path(f"/proc/{judge.pid}/maps").read_text()
    assert "libpython" in mapped or "python" in mapped
    assert "jaxlib" not in mapped and "torch" not in mapped


def test_it_ends_with_whoever_started_it() -> None:
    """Idle, it sees its input end; busy, its own timer ends it."""
    program = (
        "import os, threading\nfrom mindjax.data.tasks.worker import Worker\njudge = Worker(1.0)\n"
        "assert judge.maths('0.5', '1/2')\nprint(judge.pid, flush=True)\n"
        "threading.Timer(0.3, os._exit, (0,)).start()\njudge.matches('(a|a)*b', 'a' * 50_000)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    pid = int(result.stdout)
    end = time.monotonic() + 60
    while time.monotonic() < end and Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break  # ended, and nobody waits for it here
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{pid}/stat").exists()


def test_without_math_verify_the_fix_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('No module named math_verify')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Worker() as judge:
        for _ in range(2):  # the second question is not answered no
            with pytest.raises(RuntimeError, match="pip install math-verify"):
                judge.maths("0.5", "1/2")


def test_what_a_library_prints_is_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("print('a note')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Worker() as judge:
        assert judge.matches("a*", "aa") and not judge.matches("a*", "ab")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="has to be positive"):
        Worker(0.0)
    with pytest.raises(ValueError, match="no answer"):
        Verifier()("red", None)
    with pytest.raises(ValueError, match="not known"):
        Verifier()("red", {"kind": "poem", "value": "red"})
    assert worker.MAX_EXPRESSION < MAX_CHARACTERS
