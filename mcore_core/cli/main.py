"""Entry point: pick the command, import only what it needs, print user errors without traceback."""

import os
import sys

USAGE = """\
usage: mcore <command> [options]

commands:
  run       train: mcore run --plugin sft --model DIR --dataset FILE [--option value ...]
  export    convert a model between Hugging Face and megatron-core
  rollout   start a vLLM server that generates for `mcore run --plugin grpo --use_vllm true`
  plan      memory of each rank and the layouts that fit a cluster, without building the model
  bridge    show which rule claims which tensor: mcore bridge coverage --model DIR
  plugins   list installed plugins and what they provide
  args      list options, with types, defaults and help
  doctor    report versions, devices and what is missing

`mcore run --plugin sft --help` lists the options of a recipe, `mcore --version` the version.
With --json, plan, plugins, args and doctor print one JSON document.
"""
COMMANDS = ("run", "export", "rollout", "plan", "bridge", "plugins", "args", "doctor")
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in {"-h", "--help", "help"}:
        sys.stdout.write(USAGE)
        return 0
    if args[0] in {"-V", "--version"}:
        from importlib.metadata import version  # noqa: PLC0415  (start-up time)

        sys.stdout.write(f"mcore {version('mcore-core')}\n")
        return 0
    from mcore_core.errors import UsageError  # noqa: PLC0415  (start-up time)

    try:
        return _command(args[0], args[1:])
    except UsageError as error:
        if os.environ.get("MCORE_TRACEBACK"):
            raise
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `mcore args | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _command(name: str, argv: list[str]) -> int:
    if name not in COMMANDS:
        from mcore_core.errors import did_you_mean, usage_error  # noqa: PLC0415  (start-up time)

        raise usage_error(
            "MC001",
            f"unknown command {name!r}",
            did_you_mean(name, COMMANDS),
            "fix: one of " + ", ".join(COMMANDS),
        )
    from importlib import import_module  # noqa: PLC0415  (start-up time)

    code = import_module(f"mcore_core.cli.{name}").main(argv)
    assert isinstance(code, int)
    return code


if __name__ == "__main__":
    sys.exit(main())
