"""Published laws for learning rate and batch size, one file each: products of powers of size, tokens, compute or loss.

A fork adds one as one file, here or under a dotted name, that defines `law`. How such a law is estimated from a sweep
is `hyper_fit.py`'s business. A recommendation holds for the recipe of its source (schedule, warm-up, weight decay,
parameterisation): `setting` names it.
"""

import dataclasses
import difflib
import importlib
import math
import pkgutil
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class PowerProduct:
    """coefficient * product of (input / its unit)^exponent, in `unit`."""

    unit: str
    coefficient: float
    exponents: Mapping[str, float]
    units: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __call__(self, **inputs: float) -> float:
        log = math.log(self.coefficient)
        for name, exponent in self.exponents.items():
            log += exponent * math.log(inputs[name] / self.units.get(name, 1.0))
        return math.exp(log)

    @property
    def formula(self) -> str:
        powers = (
            f"({name}/{self.units[name]:g})^{exponent:g}" if name in self.units else f"{name}^{exponent:g}"
            for name, exponent in self.exponents.items()
        )
        return f"{self.coefficient:g} {' '.join(powers)} {self.unit}".rstrip()


@dataclasses.dataclass(frozen=True)
class HyperLaw:
    """Recommended values by name (lr, batch, ...), from inputs N parameters, D tokens, C FLOPs, L loss, E experts.

    `fitted_on` is the range of each input in the source's runs, where it states one.
    """

    name: str
    outputs: Mapping[str, PowerProduct]
    source: str
    setting: str
    fitted_on: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for output in self.outputs.values() for name in output.exponents))

    def recommend(self, **inputs: float) -> dict[str, float]:
        """Each output whose inputs are all given. Raises ValueError for none, and for inputs that are not positive."""
        for name, value in inputs.items():
            if name not in self.inputs:
                raise ValueError(f"{self.name} does not depend on {name}; it asks for {', '.join(self.inputs)}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} is not a positive finite number")
        found = {
            name: output(**{x: inputs[x] for x in output.exponents})
            for name, output in self.outputs.items()
            if set(output.exponents) <= set(inputs)
        }
        if not found:
            raise ValueError(f"{self.name} needs {', '.join(self.inputs)}; given: {', '.join(inputs) or 'nothing'}")
        return found

    def reach(self, **inputs: float) -> dict[str, float]:
        """By input, the factor by which it lies outside the source's runs: 1 within, 3 at three times their end."""
        return {x: beyond(inputs[x], ends) for x, ends in self.fitted_on.items() if x in inputs}


def beyond(value: float, ends: tuple[float, float]) -> float:
    """The factor by which a value lies outside a range, 1 within it."""
    return max(1.0, ends[0] / value, value / ends[1])


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load_hyper_law(name: str) -> HyperLaw:
    """A law by its name here, or by the dotted path of a module that defines `law`."""
    if "." not in name and name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no learning-rate or batch law {name!r}; {meant}there are {', '.join(names())}")
    try:
        return importlib.import_module(name if "." in name else f"{__name__}.{name}").law
    except (ImportError, AttributeError) as error:
        raise ValueError(f"law {name!r}: {error}; the module must be importable and define `law`") from None
