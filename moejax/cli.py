"""The `moejax` command: the table of commands, and how a mistake is reported. A command's module is imported when it runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from moejax import __version__, installation, progress, streams
from moejax.commands.shown import Shown
from moejax.errors import UserError, first_line


class Command(NamedTuple):
    """`module` has add_arguments(parser) and run(options) -> exit code; or there are `commands` below this one."""

    help: str
    module: str = ""
    commands: Mapping[str, Command] = {}


# The only place in the tool that names modules of moejax.study (tests/test_imports.py).
ESTIMATE = {
    "memory": Command("find the largest batch that fits, and break down its peak memory", "moejax.commands.estimate_memory"),
    "predict": Command("predict throughput, hours and dollars of a run", "moejax.commands.estimate_predict"),
    "plan": Command("choose a GPU by price, budget or deadline; or placements for one", "moejax.commands.estimate_plan"),
    "fit": Command("fit coefficients to several profiled runs of one model", "moejax.commands.estimate_fit"),
    "compare": Command("compare predicted and measured memory and time of runs", "moejax.commands.estimate_compare"),
    "receipts": Command("list the measurements that estimates use: published ones and yours", "moejax.commands.estimate_receipts"),
    "reproduce": Command("recompute the study's Tables III, IV and Figures 13 to 15", "moejax.study.cost.command"),
}
GROUPS = {
    "train": {
        "init": Command("write a commented config for your own data", "moejax.commands.init"),
        "data": Command("show the training data of a config: counts and examples", "moejax.commands.data"),
        "train": Command("fine-tune a model from a config file", "moejax.commands.train"),
        "export": Command("export an adapter, merged model or GGUF file, and verify it", "moejax.commands.export"),
    },
    "ask the model": {
        "chat": Command("chat with the model of a finished run", "moejax.commands.chat"),
        "generate": Command("generate answers to prompts with the model of a finished run", "moejax.commands.generate"),
        "eval": Command("measure accuracy on a task (gsm8k, piqa-generated, …)", "moejax.commands.eval"),
        "exact-match": Command("score the base and the tuned model on held-out problems", "moejax.commands.exact_match"),
        "compare": Command("compare accuracy by epoch of several runs", "moejax.study.report.accuracy"),
        "expert-load": Command("count tokens per expert and layer, for base and tuned model", "moejax.commands.expert_load"),
    },
    "time and memory": {
        "estimate": Command("estimate memory, time and cost of a run on a GPU", commands=ESTIMATE),
        "profile": Command("trace a few training steps and break down their time", "moejax.commands.profile"),
        "tune": Command("measure which kernels are exact and fastest on this machine", "moejax.commands.tune"),
        "breakdown": Command("break down the step time of a profiled run, next to the study's", "moejax.commands.breakdown"),
    },
    "the whole study": {
        "characterize": Command("run the study's experiments on this machine (resumable)", "moejax.study.characterize.command"),
        "report": Command("write the results of `moejax characterize` as HTML and Markdown", "moejax.study.report.command"),
    },
    "this machine": {
        "doctor": Command("check this machine and its installation, and suggest fixes", "moejax.commands.doctor"),
        "verify": Command("check the files of a run for damage", "moejax.commands.verify"),
        "selftest": Command("stop and resume tiny runs at random, and compare the results", "moejax.commands.selftest"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
_TABLE_3 = "moejax.study.cost.table_3"  # what `estimate memory --study` runs
_OTHER_WORDS = {"init": "new create start", "data": "dataset preview inspect",
                "train": "finetune fine-tune sft run lora", "eval": "evaluate test lm-eval",
                "generate": "infer inference", "chat": "talk converse repl", "estimate": "memory fit", "export": "merge save convert",
                "doctor": "info env check"}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Reports argparse's errors in one message, like every other mistake."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        near = difflib.get_close_matches(str(value).lower(), action.choices, n=1)
        meant = f"; did you mean {near[0]}?" if near else f" ({self.prog} --help says what each is)"
        raise UserError(f"{'/'.join(action.option_strings)} {value}: expected one of {', '.join(action.choices)}{meant}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{self.format_usage().rstrip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 2 for a user's mistake, reported in one message."""
    return _main("moejax", Command("fine-tune Mixture-of-Experts models on one GPU or several, in JAX", commands=COMMANDS), arguments)


def train_main(arguments: Sequence[str] | None = None) -> int:
    """`python train.py …`: the same as `moejax train …`."""
    return _main("train.py", COMMANDS["train"], arguments)


def estimate_main(arguments: Sequence[str] | None = None) -> int:
    """`python estimate.py …`: the same as `moejax estimate …`."""
    return _main("estimate.py", COMMANDS["estimate"], arguments)


def _main(prog: str, command: Command, arguments: Sequence[str] | None) -> int:
    streams.prepare()
    given = sys.argv[1:] if arguments is None else list(arguments)
    asked = f"{prog} {given[0]}" if given and command.commands else prog
    return guarded(lambda: _run(prog, command, given), asked)


def _run(prog: str, command: Command, given: Sequence[str]) -> int:
    """Resolve the (sub)command, parse its arguments and run it. Show the help where there is no argument."""
    bare = not given
    while command.commands:
        name, *given = given or ["--help"]
        if name == "--version":
            print(f"moejax {__version__}")
            return 0
        if name in ("-h", "--help"):
            print(_overview(prog, command), end="")
            return 0
        if name not in command.commands:
            raise UserError(_unknown_command(name, prog, command.commands))
        prog, command = f"{prog} {name}", command.commands[name]
    module = importlib.import_module(command.module)
    parser = _Parser(prog=prog, allow_abbrev=False, description=_sentence(command.help))
    module.add_arguments(parser)
    if bare:
        parser.print_help()
        return 0
    options, unknown = parser.parse_known_args(given)
    if "overrides" in options:  # argparse takes them in one place alone: before the options, or after
        options.overrides = [*options.overrides, *(text for text in unknown if "=" in text and not text.startswith("-"))]
        unknown = [text for text in unknown if text not in options.overrides]
    if unknown:
        told = _unknown_argument(unknown[0], given, parser, "overrides" in options)
        raise UserError(f"{told}\n{parser.format_usage().rstrip()}")
    if getattr(options, "study", False):
        module = importlib.import_module(_TABLE_3)
    progress.listen(Shown())
    return module.run(options)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _overview(prog: str, command: Command) -> str:
    """The help of a command that has subcommands: what each does, by group."""
    groups = GROUPS if command.commands is COMMANDS else {"commands": command.commands}
    lines = [f"usage: {prog} [--help | --version] COMMAND …", "", _sentence(command.help)]
    width = max(map(len, command.commands))
    for group, members in groups.items():
        lines += ["", f"{group}:", *(f"  {name:<{width}}  {member.help}" for name, member in members.items())]
    return "\n".join([*lines, "", f"{prog} COMMAND --help lists the options of a command.", ""])


def _unknown_command(name: str, prog: str, commands: Mapping[str, Command]) -> str:
    if name.startswith("-"):
        return f"{name} is no option of {prog}: expected a command first, one of {', '.join(commands)} ({prog} --help)"
    near = [ours for ours, theirs in _OTHER_WORDS.items() if ours in commands and name in theirs.split()]
    near = near or difflib.get_close_matches(name.replace("_", "-"), commands, n=1)
    near = near or [f"estimate {name}"] * (name in ESTIMATE and commands is COMMANDS)
    told = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(commands)}"
    return f"{name!r} is no command of {prog}: {told} ({prog} --help says what each does)"


def _unknown_argument(argument: str, given: Sequence[str], parser: argparse.ArgumentParser, configured: bool) -> str:
    """The message for an unknown argument. configured: the command accepts config values (key.sub=value)."""
    name, _, value = argument.partition("=")
    if not name.startswith("-"):
        configured = configured or any(action.dest == "config" for action in parser._actions)
        which = ", which takes no config" if name.endswith((".yaml", ".yml")) and not configured else ""
        return f"{argument!r} is one argument too many for {parser.prog}{which}: see {parser.prog} --help"
    known = [option for action in parser._actions if action.help != argparse.SUPPRESS for option in action.option_strings]
    near = difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.7)
    if configured and not near:
        from moejax import config_file
        from moejax.config import Experiment

        place = given.index(argument) + 1
        following = given[place] if place < len(given) and not given[place].startswith("-") else "VALUE"
        key = name.lstrip("-")
        found = key if config_file.is_key(key, Experiment) else config_file.suggestion(key.rpartition(".")[2], Experiment)
        meant = f"{found.split(' or ')[0]}={value or following}" if found and " " not in found.split(" or ")[0] else found
        told = f": did you mean {meant}?" if meant else f", without dashes (every key: {parser.prog} --help, moejax/config.py)"
        return f"{argument}: {parser.prog} takes values of the config as key.sub=value{told}"
    told = f": did you mean {near[0]}?" if near else f": expected one of {', '.join(o for o in known if o.startswith('--'))}"
    return f"{name} is no option of {parser.prog}{told}"


def guarded(call: Callable[[], int], asked: str) -> int:
    """Call a command and return its exit code. Faults of input, machine or installation give one message, no traceback."""
    try:
        code = call()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # anyone who read standard output is gone, as in `| head`
        streams.silence()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("\ninterrupted: what a run had finished is in its last checkpoint (--resume)", file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error, asked)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def _message(error: Exception, asked: str) -> str | None:
    """The message for a fault of input, machine or installation; None for a bug of this program."""
    match error:
        case UserError():
            return str(error)
        case PermissionError():
            why = "permission denied: this user may not read it, or not write there: change its owner or mode, or choose another place"
            return f"{error.filename or error}: {why}"
        case OSError():  # a disk that is full, a name that is too long, a file where a folder is expected …
            named = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
            return f"{named or 'a file, or standard output'}: {error.strerror or error}"
        case ModuleNotFoundError() if error.name is not None and error.name.split(".")[0] != "moejax":
            remedy = "`make demo` installs it in .venv (then: . .venv/bin/activate); BUILD.md has other ways"
            if not installation.checkout():
                remedy = installation.pip_install(*installation.requirements())
            return f"{error}: this Python lacks what moejax needs. {remedy}"
        case MemoryError():
            why = f" ({error})" if str(error) else ""
            return f"this machine's memory is full{why}: end other programs, or ask for less"
        case UnicodeEncodeError():  # of a name or an argument: texts of records are judged where they are read
            return f"{error.object!a} holds bytes that are not UTF-8: such a name cannot be written down; rename it"
        case RuntimeError() if "home directory" in str(error):  # of a user whom the machine does not know, as in a container
            return "this user has no home folder, where caches are kept: set HOME to a folder that can be written"
        case RuntimeError() | AssertionError():
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename.endswith("xla_bridge.py"):  # where jax looks for devices
                platforms = os.environ.get("JAX_PLATFORMS")
                where, why = f" (JAX_PLATFORMS={platforms})" if platforms else "", first_line(error) or "none is there"
                advice = "`moejax doctor` says what this machine has; JAX_PLATFORMS=cpu runs on its CPU"
                return f"no device for jax{where}: {why}. {advice}"
            if type(error).__name__ == "JaxRuntimeError":
                from moejax.training.program import advice as of_compiler

                return f"XLA, in `{asked}`: {first_line(error)}. Try {of_compiler(error)}"
    return None


if __name__ == "__main__":
    sys.exit(main())
