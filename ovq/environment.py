"""Config values from environment variables, which may hold secrets: such text is stored as written, unresolved."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from ovq.errors import ConfigError


def plain(node: Any) -> Any:
    """A config node as plain dictionaries, lists and scalars. Interpolations are resolved, except for text that an
    environment variable supplies: that stays as it was written, for instance "${oc.env:WANDB_PROJECT}"."""
    if not OmegaConf.is_config(node):
        return node
    raw: Any = OmegaConf.to_container(node, resolve=False)
    if isinstance(raw, list):
        return [_plain_item(node, index, item) for index, item in enumerate(raw)]
    return {key: _plain_item(node, key, item) for key, item in raw.items()}


def _plain_item(node: Any, key: Any, raw: Any) -> Any:
    if not isinstance(raw, str) or "${" not in raw:
        return plain(node[key]) if isinstance(raw, (dict, list)) else raw
    with _reads() as read:
        value = node[key]
    return raw if read and isinstance(value, str) else plain(value)


def freeze(node: Any, allowed: Collection[str] = ()) -> None:
    """Make what a stored config would read from the environment plain text: "${oc.env:NAME}" stays as it is written.

    Whoever wrote the config must not learn what this machine's variables hold, and a variable that was set only where
    the run was trained must not prevent its evaluation elsewhere.

    Args:
        node: a config node, changed in place.
        allowed: variables that may still be read.

    Raises:
        ConfigError: a value that cannot be made plain text.
    """
    raw: Any = OmegaConf.to_container(node, resolve=False)
    for key, item in list(enumerate(raw) if isinstance(raw, list) else raw.items()):
        if isinstance(item, (dict, list)):
            freeze(node[key], allowed)
        elif isinstance(item, str) and "${" in item:
            with _reads(show=False) as read, contextlib.suppress(OmegaConfBaseException):
                node[key]
            if set(read) - set(allowed):
                _make_plain(node, key, item)


def _make_plain(node: Any, key: Any, text: str) -> None:
    """Set a value to `text`, escaped so that OmegaConf reads back exactly that text."""
    node[key] = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", text)
    with _reads(show=False) as read:
        try:
            inert = node[key] == text
        except OmegaConfBaseException:
            inert = False
    if read or not inert:
        raise ConfigError(f"{key}={text} nests the environment in a way that cannot be kept as text; remove it")


@contextlib.contextmanager
def _reads(*, show: bool = True) -> Iterator[list[str]]:
    """The environment variables that interpolations read within the `with` block, however they are nested.

    Args:
        show: whether interpolations get the real values; False: a placeholder, whether or not the variable is set.
    """
    read: list[str] = []

    def watched(name: str, *default: Any) -> Any:
        read.append(name)
        return oc.env(name, *default) if show else "unread"

    OmegaConf.register_new_resolver("oc.env", watched, replace=True)
    try:
        yield read
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
