"""Laws: hand-written gradients against differences, coordinates against values, fits that give planted truths back."""

import inspect
import math

import numpy as np
import pytest

from slmjax.scaling import laws
from slmjax.scaling.fit import fit
from slmjax.scaling.laws import _projection
from slmjax.scaling.laws._terms import FLOOR, TermLaw
from slmjax.scaling.points import Point

# A plausible truth of each law, in its published parameters; the formula once more, written from the paper.
PLANTED = {
    "chinchilla": dict(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "chinchilla_no_floor": dict(A=30.0, B=60.0, alpha=0.14, beta=0.18),
    "chinchilla_tied": dict(E=1.87, A=521.0, B=1488.0, alpha=0.35),
    "minicpm": dict(L0=0.31, C_N=7.15e-2, C_D=0.3, alpha=0.29, beta=0.23),
    "power_law": dict(E=2.0, A=30.0, alpha=0.1),
    "power_law_no_floor": dict(A=2.5, alpha=0.052),
    "over_training": dict(E=1.7, a=150.0, b=220.0, eta=0.12),
    "kaplan": dict(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103),
    "kaplan_floor": dict(E=1.1, N_c=1e12, D_c=2e12, alpha_N=0.15, alpha_D=0.2),
    "kaplan_size": dict(N_c=8.8e13, alpha_N=0.076),
    "farseer": dict(E=1.6, U=0.25, a=0.3, B=0.5, b=-0.05, A=0.3, q=0.06),
    "data_constrained": dict(E=1.87, A=521.0, B=1488.0, alpha=0.35, R_D=8.0, R_N=5.0),
    "vocabulary": dict(E=5.5, A1=1.8, A2=0.2, B=2.1, alpha2=0.67, beta=0.45),
    "vocabulary_parity": dict(E=5.5, A1=1.8, A2=0.2, B=2.1, alpha2=0.67, beta=0.45),
    "clark_routing": dict(a=-0.082, b=-0.108, c=0.009, d=1.104, E_start=1.847, E_max=314.478),
    "granularity": dict(c=0.47, g=2.1, a=18.1, b=30.8, gamma=0.58, alpha=0.115, beta=0.147),
    "joint_moe": dict(
        c=1.3637, a=35.91, b=35.98, alpha=-0.1889, beta=-0.1775, delta=-0.2285, omega=0.5529, gamma=0.0098,
        zeta=-0.0259, E_start=2.0732, E_max=290.4521,
    ),
}  # fmt: skip


def saturated(E, E_start, E_max):
    return 1 / (1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max)


def repeated(total, unique, R):
    return unique + unique * R * (1 - math.exp(-max(total / unique - 1, 0) / R))


def data_constrained(E, A, B, alpha, R_D, R_N, N, D, U):
    unique = min(U, D)
    supported = min(N, (A / B) ** (1 / alpha) * unique)
    return E + A / repeated(N, supported, R_N) ** alpha + B / repeated(D, unique, R_D) ** alpha


def vocabulary(l, E, A1, A2, B, alpha2, beta, N, V, d, H):
    D = H / 1e9 * (0.00639222 * l**2 - 0.15811069 * l + 1.20470122)
    return -E + A1 / (N / 1e6) ** beta + A2 / (V / 1e3 * d / 1e3) ** alpha2 + B / D**beta


def clark(a, b, c, d, E_start, E_max, N, E):
    e = math.log10(saturated(E, E_start, E_max))
    return 10 ** (a * math.log10(N) + b * e + c * math.log10(N) * e + d)


def joint(c, a, b, alpha, beta, delta, omega, gamma, zeta, E_start, E_max, N, D, E):
    e = saturated(E, E_start, E_max)
    of_N = a * e**delta * N ** (alpha + gamma * math.log(e))
    return of_N + b * e**omega * D ** (beta + zeta * math.log(e)) + c


FORMULA = {
    "chinchilla": lambda E, A, B, alpha, beta, N, D: E + A / N**alpha + B / D**beta,
    "chinchilla_no_floor": lambda A, B, alpha, beta, N, D: A / N**alpha + B / D**beta,
    "chinchilla_tied": lambda E, A, B, alpha, N, D: E + A / N**alpha + B / D**alpha,
    "minicpm": lambda L0, C_N, C_D, alpha, beta, N, D: C_N * (N / 1e9) ** -alpha + C_D * (D / 1e9) ** -beta + L0,
    "power_law": lambda E, A, alpha, C: E + A / C**alpha,
    "power_law_no_floor": lambda A, alpha, C: A / (C / (1e15 * 24 * 3600)) ** alpha,
    "over_training": lambda E, a, b, eta, N, D: E + (a * (D / N) ** eta + b * (D / N) ** -eta) * (6 * N * D) ** -eta,
    "kaplan": lambda N_c, D_c, alpha_N, alpha_D, N, D: ((N_c / N) ** (alpha_N / alpha_D) + D_c / D) ** alpha_D,
    "kaplan_floor": lambda E, N_c, D_c, alpha_N, alpha_D, N, D: (
        E + ((N_c / N) ** (alpha_N / alpha_D) + D_c / D) ** alpha_D
    ),
    "kaplan_size": lambda N_c, alpha_N, N: (N_c / N) ** alpha_N,
    "farseer": lambda E, U, a, B, b, A, q, N, D: (
        E + U * (N / 1e9) ** -a + B * (N / 1e9) ** -b * (D / 1e9) ** -(A * (N / 1e9) ** -q)
    ),
    "data_constrained": data_constrained,
    "vocabulary": lambda V, **rest: vocabulary(math.log(V), V=V, **rest),
    "vocabulary_parity": lambda V, **rest: vocabulary(math.log(V / 1000), V=V, **rest),
    "clark_routing": clark,
    "granularity": lambda c, g, a, b, gamma, alpha, beta, N, D, G: c + (g / G**gamma + a) / N**alpha + b / D**beta,
    "joint_moe": joint,
}


def designed(law, rng, num=60):
    """Plain inputs of `num` runs: sizes and tokens over three decades, the rest over what is in use."""
    N, D = 10 ** rng.uniform(7, 10, num), 10 ** rng.uniform(9, 12, num)
    columns = {
        "N": N,
        "D": D,
        "C": 6 * N * D,
        "U": D * 10 ** rng.uniform(-2, 0.3, num),  # some runs do not repeat: D < U
        "V": 10 ** rng.uniform(3.6, 5, num),
        "d": N**0.4,
        "H": D * 4,
        "E": 2.0 ** rng.integers(0, 10, num),
        "G": 2.0 ** rng.integers(0, 6, num),
    }
    return {name: columns[name] for name in law.inputs}


def candidates(law, rng, centre_F, K=4):
    """Coordinates around the planted truth."""
    truth_1P = np.array([[PLANTED[law.name][p] for p in law.parameters]])
    theta_1P = law.coordinates(truth_1P, centre_F)
    return theta_1P * (1 + rng.normal(0, 0.02, (K, len(law.parameters))))


def planted(law, rng, num=60):
    """Points of the planted truth by the formula, without noise."""
    columns = designed(law, rng, num)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    names = Point._fields
    return [
        Point(
            f"r{i}",
            N=row.get("N", 1e8),
            D=row.get("D", 1e9),
            C=row.get("C", 6e17),
            loss=FORMULA[law.name](**PLANTED[law.name], **row),
            inputs={name: value for name, value in row.items() if name not in names},
        )
        for i, row in enumerate(rows)
    ]


@pytest.fixture(params=laws.names())
def law(request):
    return laws.load_law(request.param)


def test_every_law_here_is_planted_and_named_as_its_file():
    assert set(laws.names()) == set(PLANTED) == set(FORMULA)
    for name in laws.names():
        assert laws.load_law(name).name == name


def test_pullback_is_the_gradient(law, seed):
    rng = np.random.default_rng(seed)
    log_x_Fn = np.log(list(designed(law, rng, 11).values()))
    centre_F = law.centre(log_x_Fn)
    theta_KP, u_Fn = candidates(law, rng, centre_F), log_x_Fn - centre_F[:, None]
    g_Kn = rng.normal(size=(len(theta_KP), 11))
    gradient_KP = law.loss(theta_KP, u_Fn)[1](g_Kn)
    for p in range(theta_KP.shape[1]):
        step = np.zeros_like(theta_KP)
        step[:, p] = 1e-6
        up, down = (law.loss(theta_KP + s, u_Fn)[0] for s in (step, -step))
        differences = ((up - down) / 2e-6 * g_Kn).sum(axis=1)
        np.testing.assert_allclose(gradient_KP[:, p], differences, rtol=1e-5, atol=1e-7)


def test_slopes_are_derivatives_in_log_inputs(law, seed):
    rng = np.random.default_rng(seed)
    log_x_FK = np.log(list(designed(law, rng, 5).values()))
    centre_F = law.centre(log_x_FK)
    theta_KP, u_FK = candidates(law, rng, centre_F, K=5), log_x_FK - centre_F[:, None]

    def loss_at(u_FK):
        return np.array([law.loss(theta_KP[k : k + 1], u_FK[:, k : k + 1])[0][0, 0] for k in range(5)])

    for f, slope_K in enumerate(law.slopes(theta_KP, u_FK)):
        step = np.zeros_like(u_FK)
        step[f] = 1e-6
        differences = (loss_at(u_FK + step) - loss_at(u_FK - step)) / 2e-6
        np.testing.assert_allclose(slope_K, differences, rtol=1e-5, atol=1e-8)


def test_values_and_coordinates_are_inverse_and_mean_the_formula(law, seed):
    rng = np.random.default_rng(seed)
    columns = designed(law, rng, 7)
    log_x_Fn = np.log(list(columns.values()))
    centre_F = law.centre(log_x_Fn)
    theta_KP = candidates(law, rng, centre_F)
    values_KP = law.values(theta_KP, centre_F)
    np.testing.assert_allclose(law.coordinates(values_KP, centre_F), theta_KP, rtol=1e-9, atol=1e-9)
    loss_Kn = law.loss(theta_KP, log_x_Fn - centre_F[:, None])[0]
    for values_P, loss_n in zip(values_KP, loss_Kn, strict=True):
        named = dict(zip(law.parameters, values_P, strict=True))
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        np.testing.assert_allclose(loss_n, [FORMULA[law.name](**named, **row) for row in rows], rtol=1e-9)


def test_a_planted_truth_comes_back(law, seed):
    """Without noise, to what the conditioning of the law leaves of sixteen digits: 1e-8, and 1e-4 for saturation ends
    that a few points see."""
    found = fit(planted(law, np.random.default_rng(seed)), law=law.name, num_bootstrap=100)
    loose = {"E_start", "E_max", "R_D", "R_N"}
    for name, value in PLANTED[law.name].items():
        assert found.parameters[name] == pytest.approx(value, rel=1e-4 if name in loose else 1e-6), name
    assert found.objective < 1e-15


def test_published_values_are_inside_the_box_and_name_every_parameter(law):
    for values in law.published.values():
        assert set(values) == set(law.parameters)
        centre_F = law.centre(np.log(list(designed(law, np.random.default_rng(0)).values())))
        theta_P = law.coordinates(np.array([[values[p] for p in law.parameters]]), centre_F)[0]
        low_P, high_P = law.box(1.5)
        assert (theta_P >= low_P).all() and (theta_P <= high_P).all()
    assert set(law.identified(1.5)) == set(law.parameters) and set(law.levels) <= set(law.inputs)


def test_published_chinchilla_point():
    """Besiroglu et al. 2024: at N = 70e9, D = 1.4e12 their law says 1.8172 + 482.01/N^.3478 + 2085.43/D^.3658."""
    law = laws.load_law("chinchilla")
    values_KP = np.array([[law.published["besiroglu2024"][p] for p in law.parameters]])
    centre_F = np.log([1e9, 2e10])
    theta_KP = law.coordinates(values_KP, centre_F)
    u_F1 = (np.log([70e9, 1.4e12]) - centre_F)[:, None]
    assert law.loss(theta_KP, u_F1)[0][0, 0] == pytest.approx(1.97388, abs=1e-5)


def test_effective_tokens_of_repeated_data():
    """D'/U of 4 and 16 epochs and without end: 3.726, 10.58, 16.39 (Muennighoff et al. 2023 at R_D* = 15.39)."""
    law = laws.load_law("data_constrained")
    E, A, alpha = 1.87, 1e3, 0.35
    theta_1P = law.coordinates(np.array([[E, A, A, alpha, 15.387756, 5.0]]), np.zeros(3))
    for epochs, expected in ((4, 3.726), (16, 10.58), (1e6, 16.388)):
        loss = law.loss(theta_1P, np.log([[1e8], [epochs * 1e9], [1e9]]))[0][0, 0]  # U tokens support N = U
        assert ((loss - E) / A - 1e8**-alpha) ** (-1 / alpha) / 1e9 == pytest.approx(expected, rel=1e-3)


def test_excess_parameters_of_the_data_constrained_law_begin_at_the_optimal_size():
    """U_N is where the size and the data term are equal: a larger model than U supports is worth less than its N."""
    law = laws.load_law("data_constrained")
    values_KP = np.array([[1.87, 521.0, 1488.0, 0.35, 15.0, 5.0]])
    theta_KP, unique = law.coordinates(values_KP, np.zeros(3)), 1e9
    supported = (521 / 1488) ** (1 / 0.35) * unique
    plain = laws.load_law("chinchilla_tied")
    plain_KP = plain.coordinates(values_KP[:, :4], np.zeros(2))
    for N, same in ((0.9 * supported, True), (1.5 * supported, False)):
        ours = law.loss(theta_KP, np.log([[N], [unique], [unique]]))[0][0, 0]
        theirs = plain.loss(plain_KP, np.log([[N], [unique]]))[0][0, 0]
        assert (ours == pytest.approx(theirs, rel=1e-12)) == same and ours >= theirs * (1 - 1e-12)


def test_projected_start_is_exact_on_its_grid():
    """When the true exponents are a cell of the grid, the linear solve alone returns the truth."""
    law, u_Fn = laws.load_law("chinchilla"), np.random.default_rng(7).normal(0, 2, (2, 30))
    truth_P = np.array([np.log(1.7), np.log(0.4), np.log(0.6), 0.3, 0.4])
    loss_n = law.loss(truth_P[None], u_Fn)[0][0]
    start_SP = law.starts(u_Fn, loss_n, 3, exponent_grid=np.array([0.2, 0.3, 0.4]))
    np.testing.assert_allclose(start_SP[0], truth_P, rtol=1e-9)
    assert np.abs(start_SP[1] - truth_P).max() > 0.05


def test_nonnegative_least_squares_meets_its_optimality_conditions(seed):
    rng = np.random.default_rng(seed)
    x_GnJ, y_n = rng.normal(size=(40, 12, 3)), rng.normal(size=12)
    c_GJ, error_G = _projection.nonnegative_least_squares(x_GnJ, y_n)
    residual_Gn = y_n - np.einsum("Gnj,Gj->Gn", x_GnJ, c_GJ)
    pull_GJ = np.einsum("Gnj,Gn->Gj", x_GnJ, residual_Gn)
    assert (c_GJ >= 0).all() and (c_GJ == 0).any() and (c_GJ > 0).any()
    assert np.abs(pull_GJ[c_GJ > 0]).max() < 1e-10 and pull_GJ[c_GJ == 0].max() < 1e-10
    np.testing.assert_allclose(error_G, (residual_Gn**2).sum(axis=1))


def test_a_fork_adds_a_law_by_dotted_path(tmp_path, monkeypatch):
    source = "from slmjax.scaling.laws.power_law import law\n"
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "mine.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert laws.load_law("pkg.mine") is laws.load_law("power_law")
    for name, said in (
        ("chinchila", "did you mean 'chinchilla'.*there are chinchilla, "),
        ("no.such", "importable"),
        ("pkg.nothing", "importable"),
    ):
        with pytest.raises(ValueError, match=said):
            laws.load_law(name)


def test_a_law_of_terms_takes_a_dozen_lines(tmp_path, monkeypatch, seed):
    """What a fork writes: the terms with their derivatives, the shift of origin, and where to begin."""
    (tmp_path / "my_laws").mkdir()
    (tmp_path / "my_laws" / "logarithmic.py").write_text(inspect.cleandoc(FORK))
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(6, 10, 20)
    points = [Point(f"r{i}", N, 1e9, 6e9 * N, 1.5 + math.e * N**-0.1) for i, N in enumerate(sizes)]
    found = fit(points, law="my_laws.logarithmic", num_bootstrap=100)
    assert found.parameters == pytest.approx({"E": 1.5, "k": math.e, "s": 0.1}, rel=1e-6)
    assert isinstance(found.form, TermLaw) and found.form.kinds["E"] == FLOOR


FORK = '''
    """E + k N^-s, by hand."""
    import dataclasses
    import numpy as np
    from slmjax.scaling.laws._terms import COEFFICIENT, EXPONENT, FLOOR, Term, TermLaw, floor

    class Mine(TermLaw):
        def terms(self, theta, u):
            power = Term(theta["k"] - theta["s"] * u["N"], {"k": 1.0, "s": -u["N"]}, {"N": -theta["s"]})
            return [floor(theta["E"]), power]

        def shift(self, theta, by):
            return dict(theta) | {"k": theta["k"] - theta["s"] * by["N"]}

        def starts(self, u_Fn, loss_n, num_starts):
            return np.array([[np.log(loss_n.min() * share), np.log(loss_n.mean() * (1 - share)), 0.1]
                             for share in (0.2, 0.5, 0.8)])

    law = Mine(
        name="logarithmic", formula="E + k/N^s", source="a test", inputs=("N",),
        kinds={"E": FLOOR, "k": COEFFICIENT, "s": EXPONENT}, levels={"N": 3},
    )
'''
