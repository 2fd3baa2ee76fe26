"""YAML as configs and profiles are written in it: no key twice, dates as text; and values on the command line."""

from __future__ import annotations

from typing import Any

import yaml

from lowmem_ft.core.errors import ConfigError

QUOTE = "text that YAML reads as something else is written in quotes: \"'...'\" on a command line"
MOST_VALUES = 100_000
_NO_VALUES = "#@`%&*"  # what begins with one of them is no value in YAML, or a note beside none


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML's own loader takes the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(
                    f"The key '{key.value}' is given twice.",
                    given=f"{self.name}, line {lines[name]} and line {line}",
                    fix="keep one of them",
                )
            lines[name] = line
        return node


def _written_out(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values in and below `node`, with what they stand for in the place of aliases: a few lines may hold billions."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # of what holds itself
        below = [it for pair in node.value for it in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_written_out(it, known) for it in below)
    return known[id(node)]


# dates are text: keys that want one, as those of profiles do, read it themselves
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, name: str, *, what: str = "The config file is not YAML.", fix: str | None = None) -> Any:
    """What `text` says. `name` says where it is from.

    Raises:
        ConfigError: `what`, a key is given twice, or aliases repeat without end.
    """
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        if _written_out(node, {}) > MOST_VALUES:
            raise ConfigError(
                "Aliases repeat more than a file can hold, or lead back to where they stand.",
                given=name,
                allowed=f"{MOST_VALUES} values, written out",
                fix="write them out, without & and *",
            )
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ConfigError(what, given=f"{name}: it is nested too deeply", fix=fix) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 0b_ passes for a number
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(what, given=f"{name}: {error}", fix=fix) from None


def read_value(override: str, value: str) -> Any:
    """The value of an override, which is text where YAML could not read one, and the whole text where it reads one: no
    part of a path is a note, and no end of a line in it a space.

    Raises:
        ConfigError: it is no YAML, or has a key twice.
    """
    if value.startswith(tuple(_NO_VALUES)):
        return value
    read = read_yaml(value, override, what="The value of an override is not YAML.", fix=QUOTE)
    return value.strip(" ") if isinstance(read, str) and not value.lstrip().startswith(("'", '"')) else read
