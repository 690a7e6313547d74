"""Config values that come from the environment, which may hold secrets: text of it is stored as written, unresolved."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|KEY", re.IGNORECASE)


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


def freeze(node: Any) -> None:
    """Turn interpolations of a stored config that read an unset variable, or one named like a secret, into plain text.

    Whoever wrote the config must not learn this machine's secrets by it, and a variable that was set only where the run
    was trained must not prevent its evaluation elsewhere.
    """
    raw: Any = OmegaConf.to_container(node, resolve=False)
    for key, item in list(enumerate(raw) if isinstance(raw, list) else raw.items()):
        if isinstance(item, (dict, list)):
            freeze(node[key])
        elif isinstance(item, str) and "${" in item:
            failed = False
            with _reads() as read:
                try:
                    node[key]
                except OmegaConfBaseException:
                    failed = True
            if read and (failed or any(map(SECRET.search, read))):
                node[key] = item.replace("${", "\\${")


@contextlib.contextmanager
def _reads() -> Iterator[list[str]]:
    """The environment variables that interpolations read within the `with` block, however they are nested."""
    read: list[str] = []

    def watched(name: str, *default: Any) -> Any:
        read.append(name)
        return oc.env(name, *default)

    OmegaConf.register_new_resolver("oc.env", watched, replace=True)
    try:
        yield read
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
