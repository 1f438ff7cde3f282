"""The options of the installed SGLang, read from its source: importing it takes seconds."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from pathlib import Path
from typing import Any

from megatron_pmd.config import AgentProgram
from megatron_pmd.errors import ConfigError, MissingPackage
from megatron_pmd.plugins import did_you_mean

TOOL_PARSERS, REASONING_PARSERS = "function_call/parser_names.py", "parser/reasoning_parser_names.py"
"""Where SGLang lists the names of its parsers, each in a file with nothing else."""

FROM_A_FILE = (None, "store_true")
"""Actions of argparse whose options SGLang takes from the file that carries ours.

For others, old spellings among them, it ends at its start (utils/server_args_config_parser.py).
"""


def sglang_source() -> Path:
    """`srt` of the installed SGLang, found and not imported. Raises MissingPackage if there is none."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(
            "sglang is not installed in this environment; install the versions in constraints/stack.txt"
        )
    return Path(spec.submodule_search_locations[0]) / "srt"


@functools.cache
def server_options() -> dict[str, str]:
    """Field name of SGLang's ServerArgs -> its command-line flag without the dashes, where it has one.

    Raises MissingPackage if SGLang is not installed, or is a version that keeps its options elsewhere.
    """
    root = sglang_source()
    options: dict[str, str] = {}
    for source in sorted((root / "arg_groups" / "fields").glob("*.py")):
        options |= _declared(ast.parse(source.read_text()))
    if "model_path" not in options:
        raise MissingPackage(
            f"the sglang at {root.parent} does not declare its options in srt/arg_groups/fields, as the "
            "pinned version does; install the versions in constraints/stack.txt"
        )
    return options | _registered_by_hand(ast.parse((root / "server_args.py").read_text()))


def check_options(given: dict[str, Any], taken: dict[str, str]) -> None:
    """ConfigError for an option that SGLang does not have, or that follows a setting of ours.

    taken: SGLang's option -> our setting.
    """
    known = server_options()
    for name in given:
        if name in taken:
            raise ConfigError(f"rollout.sglang.{name} is set by {taken[name]}; remove it from rollout.sglang")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" (did you mean rollout.sglang.{near[0]}?)" if near else ""
            raise ConfigError(f"rollout.sglang.{name} is not an option of the installed SGLang{hint}")


def check_parsers(agent: AgentProgram | None) -> None:
    """ConfigError for a parser of a model's words that the installed SGLang has not."""
    if agent is None:
        return
    for setting, source in (("tool_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
        name = getattr(agent, setting)
        module = ast.parse((sglang_source() / source).read_text())
        known = ast.literal_eval(next(part.value for part in module.body if isinstance(part, ast.Assign)))
        if name is not None and name not in known:
            raise ConfigError(
                f"rollout.agent.{setting}={name!r} is no parser of the installed SGLang"
                f"{did_you_mean(name, known)}; use {', '.join(known)}"
            )


def _declared(module: ast.Module) -> dict[str, str]:
    """Fields written as `name: A[type, "help"]` or `name: A[type, Arg(...)]`."""
    found = {}
    for group in (node for node in module.body if isinstance(node, ast.ClassDef)):
        for field in (node for node in group.body if isinstance(node, ast.AnnAssign)):
            if not (isinstance(field.target, ast.Name) and isinstance(field.annotation, ast.Subscript)):
                continue
            marker = field.annotation.value
            if not (isinstance(marker, ast.Name) and marker.id == "A"):
                continue
            keywords = _arg_keywords(field.annotation)
            if not keywords.get("no_cli") and keywords.get("action") in FROM_A_FILE:
                flag = keywords.get("cli_name") or "--" + field.target.id.replace("_", "-")
                found[field.target.id] = flag.removeprefix("--")
    return found


def _arg_keywords(annotation: ast.Subscript) -> dict[str, Any]:
    return {
        keyword.arg: _written(keyword.value)
        for call in ast.walk(annotation)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Arg"
        for keyword in call.keywords
        if keyword.arg
    }


def _written(value: ast.expr) -> Any:
    """A constant, or the text of anything else."""
    return value.value if isinstance(value, ast.Constant) else ast.unparse(value)


def _registered_by_hand(module: ast.Module) -> dict[str, str]:
    """Flags that ServerArgs.add_cli_args adds one by one: `parser.add_argument("--flag", ...)`."""
    found = {}
    for call in ast.walk(module):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args:
            flag = call.args[0].value if isinstance(call.args[0], ast.Constant) else None
            action = next((_written(word.value) for word in call.keywords if word.arg == "action"), None)
            by_hand = call.func.attr == "add_argument" and action in FROM_A_FILE
            if by_hand and isinstance(flag, str) and flag.startswith("--"):
                found[flag.removeprefix("--").replace("-", "_")] = flag.removeprefix("--")
    found.pop("config", None)  # the file that carries all the others
    return found
