"""The design of a study: what a law needs of the points before it can be fitted, and resamples that keep it.

Letters: K resamples, n points, F inputs.
"""

import itertools
import math
from collections.abc import Mapping

import numpy as np

SAME_VALUE = 0.01  # values of an input closer than 1% are one level of the design
MIN_SPREAD = 0.02  # least ratio of singular values of the centred log inputs: below it the design is a line
UNITS = ("run", "ladder")


def validated(point_set, law, residual: str, num_free: int) -> tuple[np.ndarray, np.ndarray]:
    """Log inputs [F, n] and losses [n], or a ValueError that says what is missing."""
    points = point_set.points
    if len(points) < num_free + 1:
        left_out = f" ({len(point_set.excluded)} runs were left out)" if point_set.excluded else ""
        raise ValueError(
            f"{len(points)} points{left_out} are too few: {law.formula} has {num_free} parameters "
            f"and needs at least {num_free + 1} finished runs"
        )
    point_set.require_comparable()
    rows = [[_read(p, name, law) for p in points] for name in (*law.inputs, "loss")]
    for name, row in zip((*law.inputs, "loss"), rows, strict=True):
        signed = name == "loss" and residual == "raw"
        for p, value in zip(points, row, strict=True):
            if not (math.isfinite(value) and (signed or value > 0)):
                what = "finite number" if signed else "positive finite number"
                raise ValueError(f"run {p.run_id}: {name}={value} is not a {what}")
    log_x_Fn = np.log(np.array(rows[:-1], float))
    _require_variety(law, log_x_Fn)
    return log_x_Fn, np.array(rows[-1], float)


def _read(point, name, law):
    try:
        return float(point.value(name))
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"run {point.run_id} has no {name}, and {law.name} is a law of {', '.join(law.inputs)}; "
            f"name the column that holds {name}, or fit another law"
        ) from None


def _require_variety(law, log_x_Fn):
    varied = _varied(law)
    for f in varied:
        name, needed = law.inputs[f], law.levels[law.inputs[f]]
        num_levels = int(levels(log_x_Fn[f]).max()) + 1
        if num_levels < needed:
            raise ValueError(
                f"degenerate design: the runs have {num_levels} distinct {name} (values within 1% count as one), and "
                f"the effect of {name} needs at least {needed}; add runs with other {name}"
            )
    if len(varied) > 1 and spread(log_x_Fn[varied], np.ones((1, log_x_Fn.shape[1])))[0] < MIN_SPREAD:
        *others, last = bound = _bound([law.inputs[f] for f in varied], log_x_Fn[varied])
        if not others:
            ratio = math.exp(np.ptp(log_x_Fn[law.inputs.index(last)]))
            raise ValueError(
                f"degenerate design: {last} differs by no more than a factor {ratio:.3g} between the runs, too little "
                f"beside the other inputs for its effect to be told; add runs with {last} further apart"
            )
        if len(bound) == 2:
            first, other = bound
            raise ValueError(
                f"degenerate design: {other} follows {first} in all runs (one value of {other}/{first}^k), "
                f"so their effects cannot be told apart; add runs with more or fewer {other} at the same {first}"
            )
        raise ValueError(
            f"degenerate design: {', '.join(others)} and {last} hang together in all runs (one product of powers of "
            f"them), so their effects cannot be told apart; add runs that differ in one of them alone"
        )


def _bound(names, log_x_Fn):
    """The fewest inputs that make a design degenerate: one that hardly varies beside the others, or some on a line."""
    std_F, weight_1n = log_x_Fn.std(axis=1), np.ones((1, log_x_Fn.shape[1]))
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), size):
            narrow = std_F[chosen[0]] / std_F.max() if size == 1 else spread(log_x_Fn[list(chosen)], weight_1n)[0]
            if narrow < MIN_SPREAD:
                return [names[f] for f in chosen]
    raise AssertionError("only a degenerate design is asked about")


def _varied(law):
    return [f for f, name in enumerate(law.inputs) if name in law.levels]


def levels(u_n: np.ndarray) -> np.ndarray:
    """Index of the design level of each log value: sorted values less than SAME_VALUE apart share a level."""
    order = np.argsort(u_n, kind="stable")
    level_n = np.empty(len(u_n), int)
    level_n[order] = np.concatenate([[0], np.cumsum(np.diff(u_n[order]) > SAME_VALUE)])
    return level_n


def spread(u_Fn: np.ndarray, weight_Kn: np.ndarray) -> np.ndarray:
    """Smallest over largest singular value [K] of the weighted, centred inputs."""
    total_K1 = weight_Kn.sum(axis=1, keepdims=True)
    mean_KF = weight_Kn @ u_Fn.T / total_K1
    second_KFF = np.einsum("kn,fn,gn->kfg", weight_Kn, u_Fn, u_Fn, optimize=True) / total_K1[:, :, None]
    eigenvalues_KF = np.linalg.eigvalsh(second_KFF - mean_KF[:, :, None] * mean_KF[:, None, :])
    return np.sqrt(np.maximum(eigenvalues_KF[:, 0], 0) / np.maximum(eigenvalues_KF[:, -1], 1e-300))


def point_weights(points, weights: str, residual: str) -> np.ndarray:
    """Weights [n] of mean one: "equal", or "se": the inverse variance of each run's evaluation.

    The standard error says how well one evaluation measured one run; the scatter between runs is not in it, so a run
    evaluated ten times longer counts for a hundred.
    """
    if weights == "equal":
        return np.ones(len(points))
    if weights != "se":
        raise ValueError(f"weights={weights!r} is neither 'equal' nor 'se'")
    for p in points:
        if p.se is None or not (math.isfinite(p.se) and p.se > 0):
            raise ValueError(
                f"weights='se': run {p.run_id} has no standard error; give every run one, or weigh equally"
            )
    scale_n = np.array([p.se / p.loss if residual == "log" else p.se for p in points])
    return scale_n**-2 / np.mean(scale_n**-2)


def resampling_units(points, resample: str) -> np.ndarray:
    """Index [n] of what a bootstrap draws whole: "run", or "ladder", all runs of one size (N within 1%)."""
    if resample == "ladder":
        return levels(np.log([p.N for p in points]))
    if resample != "run":
        raise ValueError(f"resample={resample!r} is not one of {', '.join(UNITS)}")
    index: Mapping[str, int] = {run_id: i for i, run_id in enumerate(dict.fromkeys(p.run_id for p in points))}
    return np.array([index[p.run_id] for p in points])


def resamples(law, u_Fn, unit_n, run_n, num_free: int, num: int, seed: int) -> tuple[np.ndarray, int]:
    """Point weights [num, n] of case resamples of the units, and how many degenerate ones were drawn again.

    A resample with fewer runs than free parameters, too few levels of an input, or inputs on a line determines no law.
    """
    U, varied = int(unit_n.max()) + 1, _varied(law)
    member_nR = np.eye(run_n.max() + 1)[run_n]
    members = [
        (np.eye(level_n.max() + 1)[level_n], law.levels[law.inputs[f]]) for f in varied for level_n in [levels(u_Fn[f])]
    ]
    rng = np.random.default_rng(seed)
    weights, sound = np.empty((0, len(unit_n))), np.empty(0, bool)
    while sound.sum() < num:
        if len(sound) >= 50 * num:
            raise ValueError(
                f"{np.sum(~sound)} of {len(sound)} resamples of the {U} units determine no law; "
                "more runs are needed for intervals"
            )
        weight_Kn = rng.multinomial(U, np.full(U, 1 / U), size=num)[:, unit_n].astype(float)
        sound_K = (weight_Kn @ member_nR > 0).sum(axis=1) >= num_free
        for member_nG, needed in members:
            sound_K &= (weight_Kn @ member_nG > 0).sum(axis=1) >= needed
        if len(varied) > 1:
            sound_K &= spread(u_Fn[varied], weight_Kn) >= MIN_SPREAD
        weights, sound = np.concatenate([weights, weight_Kn]), np.concatenate([sound, sound_K])
    used = np.flatnonzero(sound)[:num]
    return weights[used], int(used[-1]) + 1 - num
