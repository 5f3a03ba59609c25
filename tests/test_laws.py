"""Laws: hand-written gradients against differences, coordinates against values, projected starts against the truth."""

import numpy as np
import pytest

from slmjax.scaling import laws

RNG = np.random.default_rng(7)


def random_candidates(law, K=5):
    F = len(law.inputs)
    return np.concatenate([RNG.normal(0, 0.5, (K, 1 + F)), RNG.uniform(0.05, 0.8, (K, F))], axis=1)


@pytest.mark.parametrize("law", laws.LAWS.values(), ids=lambda law: law.name)
def test_pullback_is_the_gradient(law):
    theta_KP, u_Fn = random_candidates(law), RNG.normal(0, 1.5, (len(law.inputs), 11))
    g_Kn = RNG.normal(size=(len(theta_KP), 11))
    gradient_KP = law.log_loss(theta_KP, u_Fn)[1](g_Kn)
    for p in range(theta_KP.shape[1]):
        step = np.zeros_like(theta_KP)
        step[:, p] = 1e-6
        up, down = (law.log_loss(theta_KP + s, u_Fn)[0] for s in (step, -step))
        np.testing.assert_allclose(gradient_KP[:, p], ((up - down) / 2e-6 * g_Kn).sum(axis=1), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("law", laws.LAWS.values(), ids=lambda law: law.name)
def test_slopes_are_derivatives_in_log_inputs(law):
    theta_KP, u_FK = random_candidates(law), RNG.normal(0, 1.5, (len(law.inputs), 5))

    def loss_at(u_FK):
        return np.exp([law.log_loss(theta_KP[k : k + 1], u_FK[:, k : k + 1])[0][0, 0] for k in range(5)])

    for f, slope_K in enumerate(law.slopes(theta_KP, u_FK)):
        step = np.zeros_like(u_FK)
        step[f] = 1e-6
        np.testing.assert_allclose(slope_K, (loss_at(u_FK + step) - loss_at(u_FK - step)) / 2e-6, rtol=1e-7)


@pytest.mark.parametrize("law", laws.LAWS.values(), ids=lambda law: law.name)
def test_values_and_coordinates_are_inverse_and_mean_the_formula(law):
    theta_KP, centre_F = random_candidates(law), np.array([17.0, 21.0])[: len(law.inputs)]
    values_KP = law.values(theta_KP, centre_F)
    np.testing.assert_allclose(law.coordinates(values_KP, centre_F), theta_KP, rtol=1e-12, atol=1e-12)
    inputs_F = np.array([3e7, 2e9])[: len(law.inputs)]
    F = len(inputs_F)
    by_formula_K = values_KP[:, 0] + (values_KP[:, 1 : 1 + F] * inputs_F ** -values_KP[:, 1 + F :]).sum(axis=1)
    log_loss_K1 = law.log_loss(theta_KP, (np.log(inputs_F) - centre_F)[:, None])[0]
    np.testing.assert_allclose(np.exp(log_loss_K1[:, 0]), by_formula_K, rtol=1e-12)


def test_published_chinchilla_point():
    """Besiroglu et al. 2024: at N = 70e9, D = 1.4e12 their law says 1.8172 + 482.01/N^.3478 + 2085.43/D^.3658."""
    values_KP = np.array([[1.8172, 482.01, 2085.43, 0.3478, 0.3658]])
    centre_F = np.log([1e9, 2e10])
    theta_KP = laws.CHINCHILLA.coordinates(values_KP, centre_F)
    u_F1 = (np.log([70e9, 1.4e12]) - centre_F)[:, None]
    assert np.exp(laws.CHINCHILLA.log_loss(theta_KP, u_F1)[0][0, 0]) == pytest.approx(1.97388, abs=1e-5)


def test_projected_start_is_exact_on_its_grid():
    """When the true exponents are a cell of the grid, the linear solve alone returns the truth."""
    law, u_Fn = laws.CHINCHILLA, RNG.normal(0, 2, (2, 30))
    truth_P = np.array([np.log(1.7), np.log(0.4), np.log(0.6), 0.3, 0.4])
    loss_n = np.exp(law.log_loss(truth_P[None], u_Fn)[0][0])
    start_SP = law.starts(u_Fn, loss_n, 3, exponent_grid=np.array([0.2, 0.3, 0.4]))
    np.testing.assert_allclose(start_SP[0], truth_P, rtol=1e-9)
    assert np.abs(start_SP[1] - truth_P).max() > 0.05


def test_nonnegative_least_squares_meets_its_optimality_conditions():
    x_GnJ, y_n = RNG.normal(size=(40, 12, 3)), RNG.normal(size=12)
    c_GJ, error_G = laws.nonnegative_least_squares(x_GnJ, y_n)
    residual_Gn = y_n - np.einsum("Gnj,Gj->Gn", x_GnJ, c_GJ)
    pull_GJ = np.einsum("Gnj,Gn->Gj", x_GnJ, residual_Gn)
    assert (c_GJ >= 0).all() and (c_GJ == 0).any() and (c_GJ > 0).any()
    assert np.abs(pull_GJ[c_GJ > 0]).max() < 1e-10 and pull_GJ[c_GJ == 0].max() < 1e-10
    np.testing.assert_allclose(error_G, (residual_Gn**2).sum(axis=1))


def test_a_fork_adds_a_law_by_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_law.py").write_text("from slmjax.scaling.laws import POWER_LAW as law\n")
    (tmp_path / "empty_law.py").write_text("")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "mine.py").write_text("from slmjax.scaling.laws import POWER_LAW as law\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert laws.load_law("pkg.mine") is laws.POWER_LAW
    for name, said in (("chinchila", "there are chinchilla"), ("no.such", "importable"), ("pkg.nothing", "importable")):
        with pytest.raises(ValueError, match=said):
            laws.load_law(name)
