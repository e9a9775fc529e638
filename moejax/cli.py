"""The `moejax` command. Nothing heavy is imported before it is needed: `--help` answers at once."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax import __version__, estimating, installation, program_cache, streams
from moejax.commands import init
from moejax.errors import UserError, first_line
from moejax.estimator import commands as estimate

if TYPE_CHECKING:
    from moejax.config import DeviceConfig

# The study's commands. Nothing else of the tool names moejax.study (tests/test_imports.py).
STUDY = {
    "characterize": "moejax.study.characterize.command", "compare": "moejax.study.report.accuracy", "report": "moejax.study.report.command",
    "estimate memory --study": "moejax.study.cost.table_3", "estimate reproduce": "moejax.study.cost.command",
}  # fmt: skip
NCU = "Nsight Compute's report of the same program (ncu --csv --page raw): its SM and DRAM %% by stage"
_OTHER_WORDS = {"init": "new create start", "train": "finetune fine-tune sft run tune lora", "eval": "evaluate test lm-eval",
                "generate": "chat infer inference", "estimate": "predict plan memory fit", "export": "merge save convert",
                "doctor": "info env check"}  # fmt: skip
ESTIMATE = "what fits, how fast, how many dollars, on which GPU"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 2 for a mistake of the user's, told in one message."""
    streams.prepare()
    parser = argparse.ArgumentParser(prog="moejax", description="Fine-tune Mixture-of-Experts models on one GPU, in JAX.")
    parser.add_argument("--version", action="version", version=f"moejax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    init.add_arguments(commands.add_parser("init", help="write a commented config for your own data"))
    add_train_arguments(commands.add_parser("train", help="fine-tune a model as a config file says", allow_abbrev=False))
    estimating.add_arguments(estimate.add_arguments(commands.add_parser("estimate", help=ESTIMATE)))
    evaluate = commands.add_parser("exact-match", help="answers of the base and of the tuned model on held-out problems")
    evaluate.add_argument("run", help="a finished run's folder, e.g. runs/demo")
    evaluate.add_argument("--data", required=True, help="held-out problems (.json, .jsonl, .csv, .parquet, with `answer`)")
    evaluate.add_argument("--limit", type=int, default=None, help="only the first so many problems")
    _add_generate(commands.add_parser("generate", help="what a finished run's model answers to a prompt"))
    _add_eval(commands.add_parser("eval", help="a run's or a model's accuracy on a task (gsm8k, hellaswag-generated, …)"))
    _add_breakdown(commands.add_parser("breakdown", help="where the time of a profiled run's step goes, beside the study's"))
    profile_help = "run a config's first steps, trace some, say where a step's time goes"
    profile = commands.add_parser("profile", allow_abbrev=False, help=profile_help)
    profile.add_argument("config", metavar="CONFIG", help="experiment in YAML; the run is called NAME-profile")
    profile.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="e.g. profile.steps=5 data.batch_rows=4")
    profile.add_argument("--ncu", default=None, metavar="CSV", help=NCU)
    load = commands.add_parser(
        "expert-load", help="tokens per expert and layer over a data set, by the base and the tuned model"
    )
    load.add_argument("run", nargs="?", default=None, help="a finished run's folder, e.g. runs/demo")
    load.add_argument("--config", default=None, metavar="FILE", help="instead of a run: the base model of this experiment")
    load.add_argument("--data", required=True, help="records such as the config trains on (.json, .jsonl, .csv, .parquet)")
    load.add_argument("--limit", type=int, default=None, help="only the first so many records")
    compare = commands.add_parser("compare", help="accuracy by epoch of runs with an eval: section, beside the study's Figure 3")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, e.g. runs/demo_sparse")
    compare.add_argument("--plot", default=None, metavar="FILE", help="draw the figure into this .png, .svg or .pdf")
    _add_export(commands.add_parser("export", help="a run's adapter or merged model, for PyTorch; reloaded and compared"))
    characterize = "the study's experiments on this machine, one resumable sweep"
    _study("characterize").add_arguments(commands.add_parser("characterize", help=characterize))
    _study("report").add_arguments(commands.add_parser("report", help="one page (HTML, Markdown) of what `moejax characterize` measured"))
    commands.add_parser("doctor", help="what this machine has, what is wrong with it, and what to do")
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or given == ["estimate"]:
        (commands.choices["estimate"] if given else parser).print_help()
        return 0
    if not given[0].startswith("-") and given[0] not in commands.choices:
        near = difflib.get_close_matches(given[0].replace("_", "-"), commands.choices, n=1)
        near = near or [ours for ours, theirs in _OTHER_WORDS.items() if given[0] in theirs.split()]
        told = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(commands.choices)}"
        print(f"error: {given[0]!r} is no command of moejax: {told} (moejax --help tells what each does)", file=sys.stderr)
        return 2
    return _parsed(parser, given, commands.choices.get(given[0]))


def _parsed(parser: argparse.ArgumentParser, given: Sequence[str], of_command: argparse.ArgumentParser | None, **preset: str) -> int:
    """Run what the arguments say. An option that does not exist is a mistake like every other, told with what may be meant."""
    options, unknown = parser.parse_known_args(given, argparse.Namespace(**preset))
    if "overrides" in options:  # argparse takes them in one place alone: before the options, or after
        options.overrides = [*options.overrides, *(text for text in unknown if "=" in text and not text.startswith("-"))]
        unknown = [text for text in unknown if text not in options.overrides]
    try:
        if unknown:
            raise UserError(_unknown_argument(unknown[0], given, of_command or parser, "overrides" in options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return guarded(options)


def _unknown_argument(argument: str, given: Sequence[str], parser: argparse.ArgumentParser, configured: bool) -> str:
    """What to say about an argument that a command does not take. configured: the command takes values of its config."""
    name, _, value = argument.partition("=")
    if not name.startswith("-"):
        return f"{argument!r} is one argument too many for {parser.prog}: see {parser.prog} --help"
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.7)
    if configured and not near:
        from moejax import config

        place = given.index(argument) + 1
        following = given[place] if place < len(given) and not given[place].startswith("-") else "VALUE"
        key = name.lstrip("-")
        found = key if config.is_key(key) else config.suggestion(key.rpartition(".")[2])
        meant = f"{found.split(' or ')[0]}={value or following}" if found and " " not in found.split(" or ")[0] else found
        told = f": did you mean {meant}?" if meant else f", without dashes (every key: {parser.prog} --help, moejax/config.py)"
        return f"{argument}: {parser.prog} takes values of the config as key.sub=value{told}"
    told = f": did you mean {near[0]}?" if near else f": expected one of {', '.join(o for o in known if o.startswith('--'))}"
    return f"{name} is no option of {parser.prog}{told}"


def prepare_jax(device: DeviceConfig) -> None:
    """jax's settings, which it reads when it is imported. What the environment sets wins."""
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(device.memory_fraction))
    if device.compilation_cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(device.compilation_cache).expanduser()))
        # jax leaves out what compiles in less than a second: most of what a start compiles, but for the step.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        program_cache.replace_unreadable(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))


def _device_of(file: str | Path | None) -> DeviceConfig:
    """The device section of a config; the defaults where there is none to read (the command itself says what is wrong)."""
    from moejax import config

    try:
        return config.DeviceConfig() if file is None else config.load(file).device
    except UserError:
        return config.DeviceConfig()


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="RUN", help="a finished run's folder, e.g. runs/demo")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue, as it stands; may be given several times")
    asked.add_argument("--instruction", action="append", metavar="TEXT", help="the same, put into the template the run was trained with")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token; 1: as the model has it")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens that have this share together")
    parser.add_argument("--top-k", type=int, default=None, help="draw from the likeliest so many tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end an answer before this text; may be given several times")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a finished run's folder, e.g. runs/demo, or a model's in Hub layout")
    parser.add_argument("--task", required=True, metavar="NAME", help="data set and rule, e.g. gsm8k, problems, hellaswag-loglikelihood")
    parser.add_argument("--data", required=True, metavar="FILE", help="a .json, .jsonl, .csv or .parquet file, or a name for `datasets`")
    parser.add_argument("--split", default=None, help="of a name for `datasets` (default: the task's)")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first N examples")
    parser.add_argument("--base", action="store_true", help="the model that the run began with: without its adapter")
    parser.add_argument("--max-new-tokens", type=int, default=None, metavar="N", help="of a generated answer (default: the task's)")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="examples computed together (default: 16)")
    parser.add_argument("--out", default=None, metavar="DIR", help="default: RUN/eval/NAME, or NAME-base with --base")


def _add_breakdown(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a profiled run's folder, a *.xplane.pb, or a step_profile.json")
    parser.add_argument("--out", default=None, metavar="DIR", help="where the figures go (default: RUN/breakdown)")
    parser.add_argument(
        "--reference",
        choices=("match", "all", "none"),
        default="match",
        help="the study's bars beside: of the same model and k (default), of all its settings, or none",
    )
    parser.add_argument("--ncu", default=None, metavar="CSV", help=NCU)
    parser.add_argument("--json", action="store_true", help="numbers to standard output instead of tables and figures")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a finished run's folder, e.g. runs/demo")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument(
        "--format", choices=("peft", "fused", "merged"), default=None, help="default: the adapter if one was trained, else the model; "
        "fused: an adapter for transformers 5 with PEFT 0.19 or later"
    )
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="reload what was written, compare its logits")
    parser.add_argument("--tolerance", type=float, default=None, help="largest logit difference, as a share of the largest logit")


def train_main(arguments: Sequence[str] | None = None) -> int:
    """`python train.py …`: the same as `moejax train …`."""
    streams.prepare()
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, description="Fine-tune a model as a config file says.")
    add_train_arguments(parser)
    return _main_of_one(parser, arguments, "train")


def estimate_main(arguments: Sequence[str] | None = None) -> int:
    """`python estimate.py …`: the same as `moejax estimate …`."""
    streams.prepare()
    parser = argparse.ArgumentParser(prog="estimate.py", description=f"{ESTIMATE[0].upper()}{ESTIMATE[1:]}.")
    estimating.add_arguments(estimate.add_arguments(parser))
    return _main_of_one(parser, arguments, "estimate")


def _main_of_one(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, command: str) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        parser.print_help()
        return 0
    return _parsed(parser, given, None, command=command)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="experiment in YAML (`moejax init` writes one)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="change single values, e.g. training.epochs=3")
    parser.add_argument("--config", dest="file", metavar="CONFIG", help="the same by name")
    parser.add_argument("--resume", action="store_true", help="continue the run of this name from its last checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="show parameters, memory and schedule; load and train nothing")


def guarded(options: argparse.Namespace) -> int:
    """The command's exit code. What is wrong with the input, the machine or the installation is one message and no traceback."""
    try:
        code = run(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read standard output is gone, as in `| head`
        streams.silence()
        return 128 + signal.SIGPIPE
    except PermissionError as error:
        print(
            f"error: {error.filename or error}: permission denied: this user may not read it, or not write there: change its owner or "
            "mode, or choose another place",
            file=sys.stderr,
        )
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "moejax":
            raise
        remedy = (
            "`make demo` installs it in .venv (then: . .venv/bin/activate); BUILD.md has other ways"
            if installation.checkout()
            else installation.pip_install(*installation.requirements())
        )
        print(f"error: {error}: this Python lacks what moejax needs. {remedy}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full, a name that is too long, a file where a folder is expected …
        named = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        print(f"error: {named or 'a file, or standard output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        why = f" ({error})" if str(error) else ""
        print(f"error: this machine's memory is full{why}: end other programs, or ask for less", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:  # of a name or an argument: texts of records are judged where they are read
        print(f"error: {error.object!a} holds bytes that are not UTF-8: such a name cannot be written down; rename it", file=sys.stderr)
        return 2
    except (RuntimeError, AssertionError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.endswith("xla_bridge.py"):  # where jax looks for devices
            if type(error).__name__ != "JaxRuntimeError":
                raise
            from moejax.training.compile import advice

            print(f"error: XLA, in `{options.command}`: {first_line(error)}. Try {advice(error)}", file=sys.stderr)
            return 2
        asked = os.environ.get("JAX_PLATFORMS")
        why = first_line(error) or "none is there"
        print(
            f"error: no device for jax{f' (JAX_PLATFORMS={asked})' if asked else ''}: {why}. `moejax doctor` says what this machine has; "
            "JAX_PLATFORMS=cpu runs on its CPU",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what a run had finished is in its last checkpoint (--resume)", file=sys.stderr)
        return 130


def _study(command: str) -> Any:
    return importlib.import_module(STUDY[command])


def run(options: argparse.Namespace) -> int:
    name = options.command
    if name == "estimate":
        name += f" {options.estimate_command}" + " --study" * getattr(options, "study", False)
    if name in STUDY:
        return _study(name).run(options)
    if options.command == "estimate":
        return (estimating if options.estimate_command in estimating.COMMANDS else estimate).run(options)
    if options.command == "breakdown":
        from moejax.profiling import command

        return command.run(options.runs, out=options.out, reference=options.reference, ncu=options.ncu, as_json=options.json)
    if options.command in ("exact-match", "generate", "eval", "expert-load", "export"):
        prepare_jax(_device_of(Path(options.run) / "config.yaml" if options.run else getattr(options, "config", None)))
    if options.command == "exact-match":
        from moejax.evaluation import exact_match

        return exact_match.run(options.run, options.data, options.limit)
    if options.command == "generate":
        from moejax.evaluation import generate_command

        return generate_command.run(options)
    if options.command == "eval":
        from moejax.evaluation import eval_command

        return eval_command.run(options)
    if options.command == "expert-load":
        from moejax.evaluation import expert_load

        return expert_load.run(options.run, options.config, options.data, options.limit)
    if options.command == "export":
        from moejax import export

        return export.run(options.run, options.out, options.format, options.verify, options.tolerance)
    if options.command == "init":
        return init.run(options)
    if options.command == "doctor":
        from moejax import doctor

        return doctor.run()
    from moejax import config

    profile = options.command == "profile"
    if not profile and options.file is not None:
        options.overrides = [text for text in (options.config, *options.overrides) if text is not None]
        options.config = options.file
    if options.config is None:
        raise UserError("which experiment? `moejax train CONFIG` (`moejax init` writes one)")
    experiment = (config.load_profiled if profile else config.load)(options.config, options.overrides)
    prepare_jax(experiment.device)
    if profile:
        from moejax.training import loop

        code = loop.run(experiment, resume=False, keep=False)
        if code == 0 and options.ncu:
            from moejax.profiling import command

            return command.run([f"{experiment.runs_dir}/{experiment.name}"], ncu=options.ncu)
        return code
    if options.dry_run:
        from moejax.training import dry_run

        return dry_run.report(experiment)
    from moejax.training import loop

    return loop.run(experiment, resume=options.resume)


if __name__ == "__main__":
    sys.exit(main())
