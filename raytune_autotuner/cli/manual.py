"""What `--help` teaches beyond the options: for each command what it is for, examples, and its exit codes.

Words only. `tests/test_docs.py` parses every example and holds the codes against docs/watching.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raytune_autotuner.study.errors import INTERRUPTED, NO_RESULT, OK, WRONG_USE

EXIT_CODES: Mapping[int, str] = {
    OK: "done",
    NO_RESULT: "it could not be done; of a study: nothing usable was measured",
    WRONG_USE: "wrong use, nothing was started",
    INTERRUPTED: "interrupted; what was measured is kept",
}


@dataclass(frozen=True)
class Page:
    """A command's part of the manual."""

    about: str
    examples: Sequence[str]
    """Command lines without the program's name."""
    codes: Mapping[int, str] = field(default_factory=dict)
    """What a code means for this command, where that says more than `EXIT_CODES`."""


ARGUMENTS: Mapping[str, str] = {
    "STUDY.yaml": "a study file",
    "RESULTS": "the folder of one run, as the run printed it",
    "TRIAL": "a trial's number",
    "json": "print JSON, for programs",
    "follow": "go on as more is written",
    "verbose": "tell more",
    "shell": "the shell that you use",
}
"""What an argument is, by its placeholder or name, where the command does not say so itself."""
OVERVIEW = Page(
    "Finds the engine settings to run, for a model, its hardware, its traffic and its promises.",
    (
        "init meta-llama/Llama-3.1-8B-Instruct --minutes 240 --output llama.yaml",
        "llama.yaml",
        "status results/llama-cpu-20260101-120000 --follow",
        "logs results/llama-cpu-20260101-120000 3 --engine",
        "export results/llama-cpu-20260101-120000 --format k8s",
    ),
)
PAGES: Mapping[str, Page] = {
    "run": Page(
        "Runs a study: the engine's defaults first, then settings that the search suggests, each on a fresh engine; "
        "then the best of them again beside the defaults. It leaves a folder with everything, and the command that "
        "serves the winner. Ctrl-C keeps what was measured.",
        (
            "configs/llama.yaml",
            "configs/llama.yaml --set search.trials=20 --set trial.timeout_s=5m",
            "configs/llama.yaml --resume",
            "configs/llama-8b-gpu.yaml --address 10.0.0.5:6379",
        ),
        {
            OK: "there is a setting to run; it may be the defaults",
            NO_RESULT: "nothing usable was measured, or its results never came to the store that they belong in",
            WRONG_USE: "the study cannot run here as it is written; nothing was started",
            INTERRUPTED: "interrupted; what was measured is kept, and --resume goes on",
        },
    ),
    "init": Page(
        "Looks at the model's configuration and at this machine (or, with --address, at a Ray cluster), and writes a "
        "study with comments: the parameters that matter there and ranges that fit in memory, load levels, promises, "
        "and as many trials as there is time for. It starts no engine. The study goes to standard output, what there "
        "is to say to standard error. Then `check STUDY.yaml` explains it, and `STUDY.yaml` alone runs it.",
        (
            "init bundled:smollm2-135m-instruct --minutes 15 > study.yaml",
            "init meta-llama/Llama-3.1-8B-Instruct --traffic 'N(1024,256)/(256,64)' --slo ttft_ms.p90=500 "
            "--slo tpot_ms.p90=50 --minutes 240 --output llama.yaml",
        ),
    ),
    "check": Page(
        "Explains a study without starting an engine: its space, what a trial costs, the first settings that would be "
        "tried, and which of them the engine would refuse.",
        ("check configs/llama.yaml", "check configs/llama.yaml --set workload.concurrency=32 --json"),
        {OK: "the study can run", WRONG_USE: "it cannot; the message names the key"},
    ),
    "bench": Page(
        "Measures one setting as a trial is measured, without a search: for a first look, for debugging, and for a "
        "server that runs already (engine: {kind: running}).",
        (
            "bench configs/llama.yaml --param max-num-seqs=32",
            "bench --trial results/llama-cpu-20260101-120000 3 --json",
        ),
        {OK: "it was measured", NO_RESULT: "it failed; the failure is printed"},
    ),
    "verify": Page(
        "Measures the winner and the baseline of an earlier run again, on fresh engine starts, with the engine and "
        "machine as they are now, and says whether the gain still holds and what is different.",
        (
            "verify results/llama-cpu-20260101-120000",
            "verify results/llama-cpu-20260101-120000 --restarts 8 --set engine.python=/opt/new/bin/python",
        ),
        {
            OK: "it holds, or it does not",
            NO_RESULT: "that could not be told",
            WRONG_USE: "nothing was started, as when the engine no longer knows a flag of the setting",
            INTERRUPTED: "interrupted; what was measured is kept, and --resume goes on",
        },
    ),
    "status": Page(
        "Says where a study stands, from its folder alone: also one that another process runs, on this machine or on "
        "another one that shares the folder, and one that was killed.",
        (
            "status results/llama-cpu-20260101-120000",
            "status results/llama-cpu-20260101-120000 --follow",
            "status results/llama-cpu-20260101-120000 --json",
        ),
        {OK: "said, whatever became of the study"},
    ),
    "logs": Page(
        "Prints what happened in a study, or the logs of one trial: its own, the engine's or the load client's.",
        (
            "logs results/llama-cpu-20260101-120000 --since 10m",
            "logs results/llama-cpu-20260101-120000 3 --engine --follow",
        ),
    ),
    "report": Page(
        "Writes report.html again and prints its path: the verdict, every trial and the charts behind it in one file. "
        "Also for a study that still runs or was killed.",
        ("report results/llama-cpu-20260101-120000",),
    ),
    "compare": Page(
        "Puts several studies side by side: what each came to, and whatever is not the same in all of them.",
        ("compare results/llama-a results/llama-b --output comparison.html",),
    ),
    "export": Page(
        "Prints the winner, or trial N, in the form in which it is served, with where it comes from as comments.",
        (
            "export results/llama-cpu-20260101-120000",
            "export results/llama-cpu-20260101-120000 --trial 3 --format k8s",
        ),
        {NO_RESULT: "the study has no winner to export"},
    ),
    "schema": Page(
        "Prints the study file as a JSON schema, from which editors check and complete it.",
        ("schema > study.schema.json",),
    ),
    "diagnose": Page(
        "Says why an engine failed, from its log: the stage that it reached, the kind of failure, whose fault it was, "
        "the line that proves it and a remedy. For any log of the engine, not only a trial's.",
        ("diagnose engine.log --exit-code 1", "diagnose - --json"),
        {OK: "the log was read, whether or not there is a failure in it"},
    ),
    "clean": Page(
        "Ends what a crash left running (engines whose study is gone, and nothing else), and says what old results "
        "weigh.",
        ("clean", "clean --results /data/results --json"),
    ),
    "completion": Page(
        "Prints what makes Tab complete commands, options, study files, results folders and trials; the shell reads it "
        "at its start.",
        ("completion bash", "completion zsh", "completion fish"),
    ),
}


def below_options(page: Page, program: str) -> str:
    """The text that follows a command's options: examples and exit codes."""
    examples = [f"  {program} {example}" for example in page.examples]
    codes = [f"  {code:<4} {meaning}" for code, meaning in {**EXIT_CODES, **page.codes}.items()]
    return "\n".join(["examples:", *examples, "", "exit codes:", *codes])
