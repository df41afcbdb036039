"""A yaml file with a reason beside its values; nothing in a name is read as anything else."""

from typing import Any, Dict, List, NamedTuple

import yaml

from fgd_inputs.names import one_line


class Value(NamedTuple):
    """A config key, its value, and why; "" where the key says it."""

    key: str
    value: Any
    why: str = ""


def yaml_text(header: str, values: List[Value]) -> str:
    """The file; ``header``: its first comment, of several lines."""
    tree: Dict[str, Any] = {}
    for entry in values:
        *nodes, name = entry.key.split(".")
        own = tree
        for node in nodes:
            own = own.setdefault(node, {})
        own[name] = entry
    lines = [_comment(line) for line in header.splitlines()]
    return "\n".join([*lines, *_lines(tree, "")]) + "\n"


def _lines(tree: Dict[str, Any], indent: str) -> List[str]:
    ret = []
    for name, own in tree.items():
        if isinstance(own, dict):
            ret += [f"{indent}{name}:", *_lines(own, indent + "  ")]
            continue
        text = isinstance(own.value, str)
        style = {"default_style": '"'} if text else {"default_flow_style": True}
        value = yaml.safe_dump(own.value, width=float("inf"), **style).partition("\n")[0]
        ret.append(f"{indent}{name}: {value}" + (f"  {_comment(own.why)}" if own.why else ""))
    return ret


def _comment(text: str) -> str:
    """One line, of characters that yaml can hold: any other would end it, or the file."""
    return "# " + "".join(x if x.isprintable() else "?" for x in one_line(text))
