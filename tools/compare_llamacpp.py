"""Compare edgellm's CPU executor with llama.cpp: one model file, same prompts and threads, alternating.

    python tools/compare_llamacpp.py MODEL.gguf --llama-python OTHER_VENV/bin/python --markdown

llama-cpp-python runs in a process of its own, in the interpreter that --llama-python names. In each round
both sides feed the same prompt and advance the same numbers of sequences behind it; who goes first changes
with the round. A ratio is llama.cpp's median time over ours, above 1 where edgellm is faster; its interval is
a bootstrap over whole rounds (docs/benchmarks.md). Then both read a text token by token, and so does the fp32
mode: KL is the mean over positions of KL(fp32 ‖ side), in nats. Ends with 1 if a figure misses its target.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from edgellm.bench.facts import machine_facts
from edgellm.bench.report import Column, Report, show
from edgellm.bench.statistics import ratio_of_medians, summarize
from edgellm.bench.workloads import parse_counts
from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.enginedir import BuildConfig
from edgellm.errors import EdgellmError, ExecutorFault, UsageError
from edgellm.executor.base import Row, Step, Want
from edgellm.executor.cpu import CpuExecutor
from edgellm.model.kv_cache import KvCache
from edgellm.model.onnx import emit
from edgellm.model.onnx_linear import Compute

WORKER: Final = Path(__file__).with_name("llamacpp_worker.py")
MAX_NUM_TOKENS: Final = 512
TOKEN: Final = 5
PAUSE_S: Final = 0.05
"""Between the sides: threads that wait spinning have gone to sleep."""

TARGETS: Final = {"prefill": (2.0, 1.8), "decode 1": (1.25, 1.1), "decode 8": (1.8, 1.6)}
"""Workload → least ratio of medians, least lower bound of it."""
MAX_KL: Final = 0.005

TEXT: Final = """
The ferry left the island at six, while the lamps along the quay were still burning and the gulls slept with
their heads under their wings. Anna stood at the stern with both hands around a paper cup and counted the
houses as they sank into the grey: the school, the bakery, the blue door where her aunt had lived. She had
packed two suitcases and left the third, the heavy one, in the hall, because it held nothing but letters and
she knew most of them by heart.

Below deck the engineer was arguing with a pump. It had failed twice in the spring, each time in calm
weather, and each time it had started again before he could find out why. "A machine that repairs itself is
worse than one that breaks," he used to say. "You never learn what was wrong with it." He wrote down the
pressure, the temperature and the time, tapped the gauge with the handle of his knife, and waited. After
eleven minutes the needle moved. He smiled, closed the valve by a quarter turn and climbed the ladder to
tell somebody.

There are three ways to cross the strait. The fast one follows the buoys and takes forty minutes; the pilots
prefer it in summer, when the water is clear and the sandbanks shine like the backs of animals. The second
keeps to the deep channel in the north, where the current is strong but honest. The third is not on any
chart. It was found by smugglers, who had reasons to be quiet, and it runs so close to the cliffs that
passengers can hear the kittiwakes quarrel over their ledges. Captain Holm had taken it four times in his
life and remembered every one of them.

That morning he chose the channel. The forecast spoke of wind from the south-west, rising to seven by noon,
and the barometer agreed. Anna watched the bow turn away from the sun. She thought of the exam she would sit
on Thursday, of the room she had rented without seeing it, and of the word her aunt had written under every
letter, always the same one, in capitals: ONWARD. Then she finished her coffee, went inside, and slept until
the bell rang.
"""
"""Prose that no model has read, some 400 tokens."""


class Ours:
    """edgellm's executor, built from the model file into a directory."""

    def __init__(
        self, checkpoint: Checkpoint, directory: Path, args: argparse.Namespace, compute: Compute
    ) -> None:
        sequences, length = (max(args.batch), args.length) if compute == "int8" else (1, args.length)
        kv_cache: KvCache = args.kv_cache if compute == "int8" else "fp32"
        build = BuildConfig(
            max_input_len=length - 1,
            max_seq_len=length,
            max_batch_size=sequences,
            max_num_tokens=MAX_NUM_TOKENS,
            opt_batch_size=sequences,
            opt_num_tokens=sequences,
        )
        directory.mkdir()
        emit(checkpoint, directory, build, compute=compute, kv_cache=kv_cache, progress=_silent)
        self._executor = CpuExecutor(
            directory,
            checkpoint.spec,
            max_batch_size=sequences,
            max_seq_len=length,
            max_num_tokens=MAX_NUM_TOKENS,
            threads=args.threads,
            kv_cache=kv_cache,
        )
        self._executor.load(_silent)

    def prefill(self, tokens: Sequence[int], sequence: int = 0) -> float:
        """Feed a prompt into an empty slot; seconds until its first token is chosen."""
        started = time.perf_counter()
        for first in range(0, len(tokens), MAX_NUM_TOKENS):
            piece = np.array(tokens[first : first + MAX_NUM_TOKENS], np.int32)
            want = Want.TOKEN if first + len(piece) == len(tokens) else Want.NONE
            self._run([Row(sequence, first, piece, want)])
        return time.perf_counter() - started

    def fill(self, sequences: int, tokens: Sequence[int]) -> None:
        """Feed the same prompt into slots 0 … n − 1."""
        for sequence in range(sequences):
            self.prefill(tokens, sequence)

    def decode(self, sequences: int, past: int, steps: int) -> list[float]:
        """Advance slots 0 … n − 1 together, a token chosen for each; seconds of each step."""
        token, seconds = np.array([TOKEN], np.int32), []
        for step in range(steps):
            started = time.perf_counter()
            self._run([Row(slot, past + step, token, Want.TOKEN) for slot in range(sequences)])
            seconds.append(time.perf_counter() - started)
        return seconds

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed the tokens one by one; their logits float32 [tokens, vocab]."""
        rows = []
        for position, token in enumerate(tokens):
            result = self._run([Row(0, position, np.array([token], np.int32), Want.LOGITS)])
            rows.append(result.logits)
        return np.concatenate(rows)

    def _run(self, rows: Sequence[Row]) -> Any:
        return self._executor.collect(self._executor.submit(Step(rows)))


class Peer:
    """llama.cpp, in the process that llamacpp_worker.py runs in; the same methods as `Ours`."""

    def __init__(self, args: argparse.Namespace, log: IO[bytes]) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [args.llama_python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self.about: dict[str, str] = {}
        self._configuration = {
            "model": str(args.model),
            "threads": args.threads,
            "sequences": max(args.batch),
            "length": args.length,
        }

    def __enter__(self) -> Peer:
        try:
            self.about = self._ask(**self._configuration)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prefill(self, tokens: Sequence[int]) -> float:
        seconds: float = self._ask(op="prefill", tokens=list(tokens))["seconds"]
        return seconds

    def fill(self, sequences: int, tokens: Sequence[int]) -> None:
        self._ask(op="fill", sequences=sequences, tokens=list(tokens))

    def decode(self, sequences: int, past: int, steps: int) -> list[float]:
        seconds: list[float] = self._ask(op="decode", sequences=sequences, past=past, steps=steps)["seconds"]
        return seconds

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        with tempfile.NamedTemporaryFile() as file:
            self._ask(op="logits", tokens=list(tokens), path=file.name)
            return np.fromfile(file.name, np.float32).reshape(len(tokens), -1)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        # If it has gone, the answer is missing, too, and says why.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().splitlines()[-3:]
            raise ExecutorFault(f"llama.cpp ended with {self._process.wait()}: {' / '.join(last)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report."""
    args = _arguments(argv)
    try:
        return _compare(args)
    except EdgellmError as error:
        print(f"compare_llamacpp: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 70)


def _compare(args: argparse.Namespace) -> int:
    from tokenizers import Tokenizer

    checkpoint = open_checkpoint(args.model)
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json().decode())
    text = tokenizer.encode(TEXT.strip(), add_special_tokens=False).ids
    args.length = max(args.prompt + args.steps, len(text)) + 1
    with (
        tempfile.TemporaryDirectory() as scratch,
        tempfile.TemporaryFile() as log,
        Peer(args, log) as peer,
    ):
        ours = Ours(checkpoint, Path(scratch) / "int8", args, "int8")
        times = _alternate(args, ours, peer)
        exact = Ours(checkpoint, Path(scratch) / "fp32", args, "fp32").logits(text)
        kl = [_kl(exact, side.logits(text)) for side in (ours, peer)]
    rows = [_speed_row(workload, args, *pair) for workload, pair in times.items()]
    rows.append({"workload": f"KL, {len(text)} tokens", "kl_edgellm": kl[0], "kl_llamacpp": kl[1]})
    misses = [str(row["workload"]) for row in rows if row.get("kl_edgellm", 0.0) > MAX_KL or _misses(row)]
    facts = {
        **machine_facts(),
        "executor": _library("onnxruntime"),
        "llama.cpp": f"llama-cpp-python {peer.about['version']} ({peer.about['system'].strip(' |')})",
        "model": args.model.name,
        "threads": args.threads,
        "rounds": args.rounds,
        "kv_cache": f"{args.kv_cache} here, f16 there",
    }
    columns = [
        Column("workload", ("workload",), right=False),
        Column("edgellm tok/s", ("edgellm",), "{:.1f}"),
        Column("llama.cpp tok/s", ("llamacpp",), "{:.1f}"),
        Column("ratio (95 %)", ("ratio", "low", "high"), "{:.2f} ({:.2f}–{:.2f})"),
        Column("target", ("target",), "≥ {:.2f}"),
        Column("KL edgellm", ("kl_edgellm",), "{:.4f}"),
        Column("KL llama.cpp", ("kl_llamacpp",), "{:.4f}"),
    ]
    samples = [{"edgellm_s": ours_s, "llamacpp_s": peer_s} for ours_s, peer_s in times.values()]
    notes = [f"below target: {', '.join(misses)}"] if misses else []
    report = Report(facts, columns, [_complete(row, columns) for row in rows], [*samples, {}], notes)
    show(report, args.form)
    if args.output is not None:
        with args.output.open("w") as file:
            show(report, "json", file)
    return 1 if misses else 0


def _alternate(
    args: argparse.Namespace, ours: Ours, peer: Peer
) -> dict[str, tuple[list[float], list[float]]]:
    """Workload → seconds of each round, (ours, llama.cpp's): a prompt's, and a step's median."""
    prompt = np.random.default_rng(0).integers(0, 1000, args.prompt).tolist()
    names = {"prefill": 1, **{f"decode {batch}": batch for batch in args.batch}}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for side in (ours, peer):
        side.fill(max(args.batch), prompt)
        side.decode(max(args.batch), args.prompt, 2)
    for turn in range(args.rounds):
        for name, batch in names.items():
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            for index in order:
                side = (ours, peer)[index]
                time.sleep(PAUSE_S)
                if name == "prefill":
                    times[name][index].append(side.prefill(prompt))
                else:
                    steps = side.decode(batch, args.prompt, args.steps)
                    times[name][index].append(summarize(steps).median)
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
    return times


def _speed_row(
    workload: str, args: argparse.Namespace, ours: Sequence[float], peer: Sequence[float]
) -> dict[str, Any]:
    tokens = args.prompt if workload == "prefill" else int(workload.split()[1])
    ratio = ratio_of_medians(peer, ours)
    return {
        "workload": workload,
        "edgellm": tokens / summarize(ours).median,
        "llamacpp": tokens / summarize(peer).median,
        "ratio": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "target": TARGETS.get(workload, (None,))[0],
    }


def _misses(row: dict[str, Any]) -> bool:
    least = TARGETS.get(str(row["workload"]))
    return least is not None and (row["ratio"] < least[0] or row["low"] < least[1])


def _complete(row: dict[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    """The row with every field of the columns; None is what it has not."""
    return {name: row.get(name) for column in columns for name in column.fields}


def _kl(exact: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean over positions of KL(exact ‖ other), in nats."""
    p, q = _log_softmax(exact), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _library(name: str) -> str:
    from importlib.metadata import version

    return f"{name} {version(name)}"


def _silent(part: str, done: float) -> None:
    """Report no progress."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2, help="of each side (default 2)")
    parser.add_argument("--rounds", type=int, default=12, help="(default 12)")
    parser.add_argument(
        "--prompt", type=int, default=256, help="tokens fed, and in front of decode (default 256)"
    )
    parser.add_argument("--batch", type=_counts, default=[1, 2, 4, 8], help="sequences (default 1,2,4,8)")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of a round (default 12)")
    parser.add_argument(
        "--kv-cache", choices=("fp32", "fp16"), default="fp32", help="edgellm's (default fp32)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write JSON here")
    form = parser.add_mutually_exclusive_group()
    for name in ("json", "csv", "markdown"):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name)
    return parser.parse_args(argv)


def _counts(text: str) -> list[int]:
    try:
        return list(parse_counts(text, "--batch", least=1))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
