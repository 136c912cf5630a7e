"""Where settings come from: a YAML file and the environment. Merging and checking is `shared.config`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
import yaml

from shared.config import Settings, resolve
from shared.errors import InvalidSetting


def load(
    cls: type[Settings],
    *,
    flags: Mapping[str, Any],
    file: Path | None,
    file_name: str,
    env_prefix: str,
    environ: Mapping[str, str] = os.environ,
) -> tuple[Settings, dict[str, str]]:
    """Resolve flags over environment over file over defaults; see `config.resolve`.

    Args:
        flags: settings given on the command line; None means not given.
        file: a file that must exist, or None to look for `file_name` here and in the user's config folder.
        env_prefix: the environment variable of setting `cloud` is this plus `CLOUD`.
    """
    path = file or _find(file_name)
    return resolve(
        cls,
        {
            str(path): _read_yaml(path) if path else {},
            "environment": {
                name: environ[variable]
                for name in cls.model_fields
                if (variable := env_prefix + name.upper()) in environ
            },
            "flags": {name: value for name, value in flags.items() if value is not None},
        },
    )


def _find(file_name: str) -> Path | None:
    candidates = (Path(file_name), platformdirs.user_config_path("duet") / file_name)
    return next((path for path in candidates if path.is_file()), None)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSetting(f"cannot read the settings file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise InvalidSetting(f"{path} is not valid YAML: {where}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidSetting(f"{path} must hold 'name: value' lines, not a {type(content).__name__}")
    return content
