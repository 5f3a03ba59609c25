"""Is the parametrization right? Coordinate check over width and depth; where the best learning rate lies.

Tensor Programs V (2203.03466, appendix D.1): train a few steps at several widths and look at the size of every
activation. Under a parametrization that transfers, sizes do not depend on width (CompleteP: nor on depth).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import config, data, ladder, optim, program, sharding
from slmjax.config import RunConfig

WIDTHS, DEPTHS = (64, 128, 256, 512), (2, 4, 8, 16)
TOLERANCE = 0.1


@dataclass(frozen=True)
class Coordinates:
    """Mean absolute activations along one axis of size: by name, [steps + 1, sizes], row t after t updates.

    `logits` are an exception: their mean absolute change since step 0.
    """

    axis: str  # width | depth
    sizes: tuple[int, ...]
    activations: dict[str, np.ndarray]

    def slopes(self) -> dict[str, float]:
        """By name, the slope of log activation against log size after the last update."""
        x = np.log(self.sizes)
        return {name: float(np.polyfit(x, np.log(rows[-1]), 1)[0]) for name, rows in self.activations.items()}

    def failures(self, tolerance: float = TOLERANCE) -> dict[str, float]:
        """The slopes outside ±tolerance; of logits, those above it.

        Logits may fall towards their limit: what the initial readout sees shrinks as 1/sqrt(width), and fades slowly.
        """
        slopes = self.slopes().items()
        return {name: s for name, s in slopes if not (s if name == "logits" else abs(s)) <= tolerance}

    def table(self, tolerance: float = TOLERANCE) -> str:
        """One line per activation: its size at each model size after the last update, and the slope."""
        failed = self.failures(tolerance)
        lines = [f"{'mean |activation|':20s}" + "".join(f"{self.axis}={n:<8d}" for n in self.sizes) + "slope"]
        for name, slope in self.slopes().items():
            values = "".join(f"{v:<{len(self.axis) + 9}.4g}" for v in self.activations[name][-1])
            lines.append(f"{name:20s}{values}{slope:+.3f}" + (" outside" if name in failed else ""))
        return "\n".join(lines)


def coordinates(cfg: RunConfig, axis: str, sizes: tuple[int, ...], steps: int = 5, num_seeds: int = 3) -> Coordinates:
    """Trains `steps` updates at each size and records activations on one fixed batch, averaged over seeds.

    The learning rate is the config's, constant: choose one large enough to move every weight. Against width every
    layer is looked at on its own; against depth, as in CompleteP (2505.01618), the residual stream after the last.

    Raises:
      ConfigError: a width that is not a multiple of the config's head_dim.
    """
    columns = [_at_size(_sized(cfg, axis, size), steps, num_seeds, per_layer=axis == "width") for size in sizes]
    return Coordinates(axis, tuple(sizes), {name: np.stack([c[name] for c in columns], 1) for name in columns[0]})


def _sized(cfg: RunConfig, axis: str, size: int) -> RunConfig:
    model = cfg.model
    width, layers = (size, model.num_layers) if axis == "width" else (model.width, size)
    ratio, group = model.mlp_width / model.width, model.num_heads // model.num_kv_heads
    shape = ladder.shape(width, layers, model.head_dim, ratio)
    shape["model.num_kv_heads"] = max(1, shape["model.num_heads"] // group)
    if model.moe.expert_width:
        shape["model.moe.expert_width"] = round(model.moe.expert_width / model.width * width)
    sized = config.override(cfg, {**shape, "mesh.steps_per_dispatch": 1})
    config.validate(sized)
    return sized


def _at_size(cfg: RunConfig, steps: int, num_seeds: int, per_layer: bool) -> dict[str, np.ndarray]:
    """By name, [steps + 1]."""
    prog = program.build(cfg, 1, sharding.make_mesh(cfg.mesh, devices=jax.devices()[:1]))
    dataset = data.open_dataset(cfg)
    fixed = dataset.batch_at(0).tokens_BT1[:, :-1]
    attention = prog.objective.attention

    @jax.jit
    def look(state, tokens_BT):
        params = jax.tree.map(lambda a: a[0], state.params)
        x_BTD, extras = prog.model.hidden(params, tokens_BT, None, attention)
        logits = prog.model.unembed(prog.model.readout(params), x_BTD)
        return {**extras["activations"], "final": jnp.mean(jnp.abs(x_BTD))}, logits

    hyper = jax.tree.map(lambda a: a[None, None], optim.hyper_at(cfg, 1.0))
    runs = []
    for seed in range(num_seeds):
        std = np.full(1, cfg.model.parametrization.init_std, np.float32)
        state = prog.init(np.full(1, seed, np.uint32), std)
        seen, logits_0 = look(state, fixed)
        rows = [_flat(seen, 0.0, per_layer)]
        for step in range(steps):
            tokens, segments = (a[None, None] for a in dataset.batch_at(step))
            state, _ = prog.train(state, tokens, segments, hyper, np.ones(1, np.int32))
            seen, logits = look(state, fixed)
            rows.append(_flat(seen, float(jnp.mean(jnp.abs(logits - logits_0))), per_layer))
        runs.append(rows)
    return {name: np.mean([[row[name] for row in rows] for rows in runs], axis=0) for name in runs[0][0]}


def _flat(activations: dict, logits: float, per_layer: bool) -> dict[str, float]:
    flat = {}
    for name, value in jax.device_get(activations).items():
        if np.ndim(value) == 0:
            flat[name] = float(value)
        elif per_layer:
            flat |= {f"{name}.{layer}": float(v) for layer, v in enumerate(value)}
        elif name == "residual":
            flat[name] = float(value[-1])
    return {**flat, "logits": logits} if per_layer else flat


def plot(checks: list[Coordinates], path: Path, title: str) -> None:
    """Activation against size on log axes, one panel per check and step, dark lines for later steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [list(check.activations) for check in checks]
    columns = max(len(n) for n in names)
    figure, axes = plt.subplots(
        len(checks), columns, figsize=(2.2 * columns, 2.4 * len(checks)), squeeze=False, layout="constrained"
    )
    for row, check in zip(axes, checks, strict=True):
        failed = check.failures()
        for panel, name in zip(row, check.activations, strict=False):
            values = check.activations[name]
            for t, line in enumerate(np.where(values > 0, values, np.nan)):
                panel.loglog(check.sizes, line, color=plt.cm.viridis(0.9 - 0.8 * t / max(1, len(values) - 1)), lw=1)
            panel.set_title(f"{name}\n{check.slopes()[name]:+.2f}", fontsize=8, color="C3" if name in failed else "k")
            panel.set_xticks(check.sizes, check.sizes, fontsize=6)
            panel.set_xticks([], minor=True)
            low, high = values[values > 0].min(), values.max()
            middle = math.sqrt(low * high)
            panel.set_ylim(min(low / 1.2, middle / 3), max(high * 1.2, middle * 3))  # flat must look flat
            panel.tick_params(axis="y", labelsize=6, which="both")
        for panel in row[len(check.activations) :]:
            panel.axis("off")
        row[0].set_ylabel(f"mean |activation|\nagainst {check.axis}", fontsize=8)
    figure.suptitle(f"{title}: later steps darker, slope after the last", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
