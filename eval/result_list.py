"""Results of an evaluation as a list in a JSON file, to which further ones are added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ovq.errors import ConfigError, one_line


def read(path: Path, entry: str, kind: type, *, mend: str) -> list[dict[str, Any]]:
    """The results in a file; none if there is no file.

    Args:
        entry, kind: an entry that each result has, and its type.
        mend: what to do about a file with other content, for the message.

    Raises:
        ConfigError: the file contains something else.
    """
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_bytes())
        if not isinstance(results, list) or not all(isinstance(each[entry], kind) for each in results):
            raise ValueError("not a list of results")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} holds no results of this command ({one_line(error)}); {mend}") from None
    return results
