"""Hostile study files, and what must be true of each: it is refused with a clear message, or it is harmless.

`STUDIES` makes them: file contents with overrides. `examine` puts one through all that a study goes through before
and after its engine runs, but for the engine itself: loading, checks, command lines, results, exports. Commands and
scripts are really run, by programs that write down what they were given. Used by `test_hostile.py` and `scripts/fuzz`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from hypothesis import strategies as st

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.flags import arguments
from raytune_autotuner.report.best import write_best
from raytune_autotuner.report.export import FORMS, export
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.verdict import study_verdict
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.masking import MASK
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study
from raytune_autotuner.tune.checks import check_study
from tests.report_samples import measured
from tests.studies import BASE
from tests.study_folders import VERSIONS

LIMIT_S = 20.0
"""Of CPU: nothing that is done with a study before it runs takes so long."""
_PATIENCE_S = 120.0  # for a program that prints, on a machine that is busy
CANARY = "owned"
"""What would exist if a value were run."""
_TIMES_TRIED = 6  # settings of a study whose command is looked at

# What is hidden in values

SHELL = [
    f"; touch {CANARY}",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"a && touch {CANARY} #",
    f"| touch {CANARY}",
    f"\ntouch {CANARY}\n",
    f"'; touch {CANARY}; '",
    f'"; touch {CANARY}; "',
    f"x'\"'\"'; touch {CANARY} #",
    f"\\\ntouch {CANARY}",
    "${IFS}$HOME$(id)",
    "$(NAME) $$(NAME) ${NAME} %s%n {{ 7*7 }}",
    "*?[a-z]~{a,b}",
    "$$",
    "a$$(NAME)",
]
FLAGS = ["--trust-remote-code", "--", "-x", "--host=0.0.0.0", "--config", "-O3", "@args", "a --middleware b", "\t--x"]
PATHS = ["../../../../etc/passwd", "/etc/shadow", "~root", "file:///etc/passwd", "\\\\host\\share", "...", "a/../../b"]
TEXT = [
    "",
    " ",
    "\x1b[2J\x1b]0;title\x07",
    "\u202egpj.exe",
    "a\u2028b\u2029c\x85d\x0be\x0cf\rg",
    "\ufeff",
    "trust\u2010remote\u2010code",
    "\uff4d\uff41\uff58-num-seqs",
    "m\u0430x-num-seqsé",
    "👩‍💻" * 40,
    "x" * 5_000,
    "=cmd|'/c calc'!A1",
    "<script>alert(1)</script>",
    "a: b",
    "# c",
    "---",
    "!!python/object/apply:os.system [id]",
    "null",
    "yes",
    "0x1F",
    "1e999",
    "2001-01-01",
    "https://me:pass-word-1@host/x",
    "hf_0123456789abcdef",
]
IMPOSSIBLE = ["\x00", "a\0b", "\ud800", "\udcff"]
NUMBERS = [0, -1, 10**15, 10**18, 10**400, -(2**63), 1e308, float("inf"), float("nan"), 5e-324, 0.1]
CODE_FLAGS = {
    "trust-remote-code": True,
    "middleware": "os.system",
    "logits-processors": ["a.B"],
    "worker-cls": "a.B",
    "worker-extension-cls": "a.B",
    "scheduler-cls": "a.B",
    "tool-parser-plugin": "/tmp/x.py",
    "reasoning-parser-plugin": "/tmp/x.py",
    "log-config-file": "/tmp/x.json",
    "load-format": "pt",
    "distributed-executor-backend": "a.B",
    "model-loader-extra-config": {"a": "b"},
    "compilation-config": {"backend": "os.system"},
    "compilation-config.inductor_passes": {"post_grad_custom_post_pass": "os.system"},
    "kv-transfer-config": '{"kv_connector_module_path": "x"}',
    "ec-transfer-config": {"ec_connector_module_path": "x"},
    "structured-outputs-config": {"reasoning_parser_plugin": "/tmp/x.py"},
    "speculative-config": {"method": "custom_class", "model": "a.B"},
    "spec-model": "a.B",
    "allowed-local-media-path": "/",
}
CODE_VARIABLES = [
    *("PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD", "LD_LIBRARY_PATH", "PATH", "BASH_ENV", "VLLM_PLUGINS"),
    *("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_RUST_FRONTEND_PATH", "VLLM_LOGGING_CONFIG_PATH", "CUDA_HOME"),
    *("TRITON_CACHE_DIR", "NCCL_NET_PLUGIN", "HF_ENDPOINT", "AWS_CONFIG_FILE", "TORCHINDUCTOR_CACHE_DIR"),
]


def _mostly(usual: st.SearchStrategy[Any], rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The usual, and once in twenty the rare: a study that is refused for one thing says nothing of its others."""
    return st.integers(0, 19).flatmap(lambda number: rare if number == 19 else usual)


_readable = st.sampled_from([*SHELL, *FLAGS, *PATHS, *TEXT])
_printed = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
_texts = _mostly(
    st.one_of(_readable, st.lists(_readable, min_size=2, max_size=4).map("".join), _printed),
    st.one_of(st.text(), st.sampled_from(IMPOSSIBLE)),
)
_scalars = _mostly(_texts, st.one_of(st.sampled_from(NUMBERS), st.booleans(), st.none()))
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3), max_leaves=5
)
_flags = st.sampled_from(
    ["chat-template", "served-name", "max-num-seqs", "hf-overrides", "hf-overrides.x", "dtype", "a"]
)
_names = _mostly(_flags, _texts)
_variables = _mostly(
    st.sampled_from(["VLLM_X", "HF_TOKEN", "OMP_X", "LC_ALL"]), st.one_of(st.sampled_from(CODE_VARIABLES), _texts)
)
_distributions = _mostly(
    st.lists(_mostly(_texts, _values), min_size=1, max_size=4).map(lambda values: {"choice": values}),
    st.one_of(
        st.tuples(_scalars, _scalars).map(lambda ends: {"int": list(ends)}),
        st.tuples(_scalars, _scalars, _scalars).map(lambda ends: {"float": [*ends[:2]], "step": ends[2]}),
        st.tuples(_texts, _texts).map(lambda both: {"choice": [both[0]], "when": both[1]}),
        st.just("bool"),
        _values,
    ),
)
_code = st.sampled_from([*CODE_FLAGS.items()])


@st.composite
def _structured(draw: st.DrawFn) -> bytes:
    """A study that would run, with hostile values in some places."""
    study: dict[str, Any] = yaml.safe_load(yaml.safe_dump(BASE))
    if draw(st.booleans()):
        study |= {"model": "org/model", "engine": {"kind": "vllm"}}
    for _ in range(draw(st.integers(1, 4))):
        _spoil(draw, study)
    return yaml.safe_dump(study, allow_unicode=draw(st.booleans()), sort_keys=False).encode("utf-8", "surrogatepass")


def _spoil(draw: st.DrawFn, study: dict[str, Any]) -> None:
    """Put something hostile into one place of `study`."""
    usual, rare = ["args", "env", "space"], ["code", "code-space", "points", "text", "any", "constraint"]
    place = draw(_mostly(st.sampled_from(usual), st.sampled_from(rare)))
    sections = {name: study.setdefault(name, {}) for name in ("engine", "search_space", "search")}
    if not all(isinstance(section, dict) for section in sections.values()):
        return  # it is spoilt already
    engine, space, search = sections.values()
    if place == "args":
        engine["args"] = draw(st.dictionaries(_names, _values, min_size=1, max_size=3))
    elif place == "env":
        engine["env"] = draw(st.dictionaries(_variables, _values, min_size=1, max_size=3))
    elif place == "code":
        engine["args"] = dict([draw(_code)])
    elif place == "space":
        space[draw(st.one_of(_names, _variables.map("env:{}".format)))] = draw(_distributions)
    elif place == "code-space":
        name, value = draw(_code)
        space[name] = {"choice": [value]}
    elif place == "points":
        search["points"] = [draw(st.dictionaries(_names, _values, max_size=2))]
    elif place == "constraint":
        study["constraints"] = [
            draw(st.one_of(_texts, st.just("(" * 99 + "1" + ")" * 99), st.just("9" * 900 + " > 1")))
        ]
    elif place == "text":
        study[draw(st.sampled_from(["study", "model", "space", "objective", "workload"]))] = draw(_values)
    else:
        section = draw(st.sampled_from([*study]))
        if isinstance(study[section], dict):
            study[section][draw(st.one_of(st.sampled_from([*study[section], "dataset", "warm_start"]), _texts))] = draw(
                _values
            )


_BOMBS = [
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    b"study: &s [*s]\n",
    b"<<: {study: x}\n",
    b"study: !!python/object/apply:os.system ['touch owned']\n",
    b"study: !!python/name:os.system\n",
    b"study: !<tag:yaml.org,2002:binary> aGk=\n",
    b"? [a, b]\n: c\n",
    b"? {a: b}\n: c\n",
    b"%YAML 9.9\n---\nstudy: x\n",
    b"study: x\n---\nstudy: y\n",
    b"study: t\x00\n",
    b"\xff\xfes\x00t\x00u\x00",
    b"\xef\xbb\xbfstudy: t\n",
    b"study: " + b"9" * 10_000 + b"\n",
    b"study: 1:59:59:59:59:59\n",
    b"a: " + b"[" * 50_000,
    b"a: " + b"{b: " * 50_000,
    b"- " * 50_000,
    b"? " * 10_000,
    b"'" + b"\\" * 100_000,
    b"x" * 250_001,
    b"".join(b"k%d: v\n" % n for n in range(20_000)),
    b"study: \xed\xa0\x80\n",
    b'study: "\\ud800"\n',
    b"study: \x1b[2J\n",
    b"\t" * 1_000 + b"study: x",
]


@st.composite
def _torn(draw: st.DrawFn) -> bytes:
    """A study file with bytes taken out, put in or doubled."""
    text = bytearray(yaml.safe_dump(BASE).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        junk = draw(
            st.one_of(
                st.sampled_from([b"\n", b": ", b"- ", b"&a ", b"*a", b"!!x ", b"\t", b"'", b"{"]), st.binary(max_size=6)
            )
        )
        text[at : at + draw(st.integers(0, 20))] = junk
    return bytes(text)


_files = st.one_of(
    _structured(), _structured(), _structured(), st.sampled_from(_BOMBS), _torn(), st.binary(max_size=200)
)
_keys = st.one_of(
    st.sampled_from(["engine.args.x", "study", "engine.env.PATH", "search.points", "a" * 300, "a.b.c"]), _texts
)
_overrides = st.lists(st.tuples(_keys, _texts).map("=".join), max_size=2)
STUDIES = st.tuples(_files, _mostly(st.just([]), _overrides))


# What must be true


class TooSlow(BaseException):
    """It took more than `LIMIT_S`; no ordinary handler may swallow it."""


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def examine(content: bytes, overrides: Sequence[str], folder: Path) -> bool:
    """Whether the study is taken; fails where it is neither clearly refused nor harmless. `folder` is empty."""
    (folder / "study.yaml").write_bytes(content)
    taken = True
    with _limit(), contextlib.chdir(folder):
        try:
            study = load_study(Path("study.yaml"), overrides)
            check_study(study, folder / "results")
            _is_harmless(study, folder)
        except ConfigError as error:
            _is_clear(str(error))
            taken = False
    assert {path.name for path in folder.iterdir()} <= {"study.yaml", "results", "bin"}
    return taken


def _is_clear(message: str) -> None:
    lines = message.split("\n")
    assert 1 <= len(lines) <= 3, message
    assert all(line.strip() and len(line) < 600 for line in lines), message
    assert all(line.isprintable() for line in lines), message


def _settings(study: Study) -> list[Params]:
    """The baseline, the study's own points, and the ends of every parameter."""
    ends: list[Params] = [{p.name: value} for p in study.space.parameters for value in p.bounds]
    return [{}, *study.search.points, *ends][:_TIMES_TRIED]


def _is_harmless(study: Study, folder: Path) -> None:
    engine, words = make_engine(study), list[str]()
    for params in _settings(study):
        setting = study.setting(params)
        launch = engine.launch(params, 8000)
        _holds_each_value_once(setting, launch.argv)
        _asks_for_no_code(study, launch.argv, launch.env)
        words += launch.argv
    assert _given(words) == words
    row = measured(3, 120.0, dict(params))
    _is_written_safely(study, row.params, folder, engine.launch_lines(params)[0])


def _holds_each_value_once(setting: Params, argv: Sequence[str]) -> None:
    """Every text of the setting is one argument, whole; nothing else is there beside the engine's own."""
    flags = arguments(setting)
    at = len(argv) - len(flags) if argv[-len(flags) :] == tuple(flags) else argv.index(flags[0]) if flags else 0
    assert list(argv[at : at + len(flags)]) == flags
    for name, value in setting.items():
        if isinstance(value, str) and not name.startswith("env:"):
            assert f"--{name}={value}" in flags or any(
                flags[i : i + 2] == [f"--{name}", value] for i in range(len(flags))
            )


def _asks_for_no_code(study: Study, argv: Sequence[str], env: Params) -> None:
    if study.engine.trust_code:
        return
    flags = {part.partition("=")[0].partition(".")[0] for part in argv if part.startswith("--")}
    assert not flags & {f"--{name}" for name in list(CODE_FLAGS)[:9]}
    assert not set(env) & {*CODE_VARIABLES, "LD_AUDIT", "PERL5LIB", "GCONV_PATH", "http_proxy"}


def _given(argv: list[str]) -> list[str]:
    """`argv` as a program that is really started with it gets it."""
    done = subprocess.run(["/usr/bin/printf", "%s\\0", *argv], capture_output=True, check=True, timeout=_PATIENCE_S)
    return done.stdout.decode().split("\0")[:-1]


def _is_written_safely(study: Study, params: Params, folder: Path, launch_line: str) -> None:
    """The results folder, the winner's files and every export hold the setting's values, and nothing of them is run."""
    run = ResultsFolder.create(folder / "results", study)
    row = replace(measured(3, 120.0, dict(params)), trial_id="t_3")
    run.write_rows([row])
    run.write_versions(VERSIONS)
    write_best(run, study, row, study_verdict(study, [row]), study.model, launch_line)
    kept = run.load_study()
    secret = MASK in run.study_file.read_text(encoding="utf-8")
    assert secret or kept == study
    assert run.read_rows()[0].params == params or secret
    _is_a_configuration(run.best_file.read_text(encoding="utf-8"), study, params, secret)
    _runs_one_command(f"exec {run.launch_file}", "env", folder)
    if study.engine.kind == "vllm":
        _exports_safely(run, study, params, folder, secret)


def _exports_safely(run: ResultsFolder, study: Study, params: Params, folder: Path, secret: bool) -> None:
    """One of the forms, for each reads the folder again."""
    form = FORMS[len(str(study)) % len(FORMS)]
    text = export(run, form, as_flags=arguments, number=3)
    if form == "yaml":
        _is_a_configuration(text, study, params, secret)
    else:
        assert secret or _has_in_order(_EXPORTED[form](text, folder), arguments(study.setting(params)))


def _composed(text: str, folder: Path) -> list[str]:
    """As Compose reads a command: `$$` is `$`, and a single one a variable."""
    (compose,) = yaml.safe_load_all(text)
    (service,) = compose["services"].values()
    return [part.replace("$$", "$") for part in service["command"]]


def _deployed(text: str, folder: Path) -> list[str]:
    """As Kubernetes reads arguments: `$$` is `$`, and `$(NAME)` a variable, of which there is none here."""
    deployment, _ = yaml.safe_load_all(text)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    variable = re.compile(r"\$\$|\$\(\w+\)")
    return [variable.sub(lambda found: "$" if found[0] == "$$" else "EXPANDED", part) for part in container["args"]]


def _is_a_configuration(text: str, study: Study, params: Params, secret: bool) -> None:
    """A YAML mapping of the setting's flags with the model, and nothing that came in through a value."""
    flags = {name for name, value in study.setting(params).items() if not name.startswith("env:") and value is not None}
    found = yaml.safe_load(text)
    assert set(found) - {"model", "served-model-name"} == flags
    for name in flags:
        value = study.setting(params)[name]
        assert secret or found[name] == value or isinstance(value, list)


def _runs_one_command(script: str, program: str, folder: Path) -> list[str]:
    """What `program` is given when a shell runs `script`; nothing else is run, and it is run once."""
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    recorder = place / program
    if not recorder.exists():
        recorder.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nprintf 'end\\0'\n")
        recorder.chmod(0o755)
    environment = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "HF_TOKEN": "mine"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, env=environment, check=True, timeout=_PATIENCE_S)
    parts = done.stdout.decode().split("\0")
    assert parts.count("end") == 1
    assert parts[-2:] == ["end", ""]
    return parts[:-2]


_EXPORTED = {
    "vllm": lambda text, folder: _runs_one_command(text, "vllm", folder),
    "docker": lambda text, folder: _runs_one_command(text, "docker", folder),
    "compose": _composed,
    "k8s": _deployed,
}
"""Form to the arguments that its engine gets."""


def _has_in_order(whole: Sequence[str], part: Sequence[str]) -> bool:
    """Whether `part` stands in `whole`; also where something in it was taken for a secret."""
    if any(MASK in one for one in whole):
        return True
    return any(list(whole[i : i + len(part)]) == list(part) for i in range(len(whole) - len(part) + 1))
