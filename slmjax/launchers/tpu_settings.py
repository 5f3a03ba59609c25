"""The TPU that a study trains on, from a small TOML file that the user keeps; `launch/tpu/` has some to begin from."""

import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from slmjax.config import ConfigError, nearest


@dataclass(frozen=True)
class Settings:
    """Fields are keys of the file; those with "" or False may be left out.

    setup: shell lines run on every worker before training; they end with `slmjax` on the PATH.
    valid_until: how long a request may wait in the queue, e.g. "6h"; for ever when left out.
    """

    accelerator_type: str
    zone: str
    runtime_version: str
    setup: str
    project: str = ""
    spot: bool = False
    service_account: str = ""
    network: str = ""
    subnetwork: str = ""
    valid_until: str = ""

    @property
    def place(self) -> list[str]:
        """Flags that every command about the TPU needs."""
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]

    @property
    def creation(self) -> list[str]:
        optional = {
            "service-account": self.service_account,
            "network": self.network,
            "subnetwork": self.subnetwork,
            "valid-until-duration": self.valid_until,
        }
        return [
            f"--accelerator-type={self.accelerator_type}",
            f"--runtime-version={self.runtime_version}",
            *(f"--{name}={value}" for name, value in optional.items() if value),
            *(["--spot"] if self.spot else []),
        ]


def read(path: Path | None) -> Settings:
    """The settings in a file.

    Raises:
      ConfigError: there is none, or it has a key or value that is not understood.
    """
    if path is None or not path.exists():
        missing = "--on=tpu needs a settings file" if path is None else f"there is no {path}"
        raise ConfigError(f"{missing}; copy one of launch/tpu/, edit it, and name it by --script")
    try:
        said = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    known = {field.name: field for field in fields(Settings)}
    for key, value in said.items():
        if key not in known:
            raise ConfigError(f"{path}: {key} is not known; {nearest(key, known)}")
        if type(value) is not known[key].type:
            raise ConfigError(f"{path}: {key}={value!r} must be a {known[key].type.__name__}")
    for name, field in known.items():
        if field.default is MISSING and not said.get(name):
            raise ConfigError(f"{path}: {name} is missing")
    return Settings(**said)
