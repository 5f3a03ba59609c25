"""Initial scale, learning rate, weight decay, Adam's epsilon and forward multipliers of every tensor, from its role.

One object per model, chosen by name, because a rule that is right for one of these numbers is right only together with
the others. m_N is width over base width, m_L layers over base layers; at the base size mup and completep equal sp.
"""

import math
from typing import NamedTuple

from slmjax.config import ModelConfig

# readout: an untied output matrix. router: weights whose products choose experts. balance: the loss-free bias of that
# choice, which no gradient reaches and the trainer moves by a rule of its own.
ROLES = ("embed", "hidden", "norm", "bias", "readout", "router", "balance")


class Rule(NamedTuple):
    """What one tensor gets. The factors multiply the run's own lr, weight_decay and eps.

    `decay` is relative to a decay of schedule x lr x weight_decay whatever the tensor's `lr` factor is, so scaling a
    group's rate leaves its decay alone (CompleteP's coupled "lam x m_N" is `decay = 1` here).
    """

    init_std: float  # of a normal distribution; norm gains start at 1 and biases at 0 whatever this says
    lr: float = 1.0
    decay: float = 1.0
    eps: float = 1.0
    forward: float = 1.0  # multiplies the tensor where it is used
    orthogonal_lr: float = (
        1.0  # in place of lr for Muon, whose update has a spectral norm ~ sqrt(width), Adam's ~ width
    )


class Parametrization(NamedTuple):
    cfg: ModelConfig

    @property
    def width_ratio(self) -> float:
        return self.cfg.width / self.cfg.parametrization.base_width

    @property
    def depth_ratio(self) -> float:
        return self.cfg.num_layers / self.cfg.parametrization.base_layers

    def rule(self, role: str, fan_in: int, in_block: bool, init_std: float | None = None) -> Rule:
        """The Rule of a tensor.

        Args:
          role: one of ROLES.
          fan_in: inputs that each output of the tensor sums over.
          in_block: whether it belongs to a residual branch.
          init_std: replaces the config's; may be traced, so that a sweep over it compiles once.
        """
        assert role in ROLES, role
        s = self.cfg.parametrization.init_std if init_std is None else init_std
        if role == "balance":
            return Rule(0.0, lr=0.0, decay=0.0)
        return _SCHEMES[self.cfg.parametrization.name](self, role, fan_in, in_block, s)

    @property
    def embed_multiplier(self) -> float:
        return self.cfg.parametrization.embed_multiplier

    @property
    def logits_multiplier(self) -> float:
        """Multiplies the logits rather than the readout, so that a tied matrix keeps its scale as an embedding."""
        scale = self.cfg.parametrization.logits_multiplier
        match self.cfg.parametrization.name:
            case "mup" | "minicpm" | "completep":
                return scale / self.width_ratio
            case "umup":
                return scale / self.cfg.width
        return scale

    @property
    def router_std(self) -> float:
        return self.cfg.moe.router_std

    @property
    def attention_scale(self) -> float:
        """Multiplies q·k: 1/sqrt(head_dim), or proportional to 1/head_dim when base_head_dim says that it grows."""
        base, head_dim = self.cfg.parametrization.base_head_dim, self.cfg.head_dim
        return math.sqrt(base) / head_dim if base else 1 / math.sqrt(head_dim)

    def residual(self, branch: int) -> tuple[float, float]:
        """(skip, branch) multipliers of residual branch 0..2L-1, attention and feed-forward in turn."""
        cfg, L = self.cfg.parametrization, self.cfg.num_layers
        match cfg.name:
            case "minicpm":
                return 1.0, cfg.residual_multiplier / math.sqrt(L)
            case "completep":
                return 1.0, cfg.residual_multiplier * self.depth_ratio**-cfg.depth_alpha
            case "umup":
                # Appendix G of u-muP with equal attention and feed-forward ratios: every branch adds the same variance,
                # and all branches of one kind together as much as the embedding, in a stream kept at unit scale.
                tau2 = cfg.residual_multiplier**2 / (L + branch * cfg.residual_multiplier**2)
                return 1 / math.sqrt(1 + tau2), math.sqrt(tau2 / (1 + tau2))
        return 1.0, cfg.residual_multiplier


def _no_decay(role: str) -> float:
    return 0.0 if role in ("norm", "bias") else 1.0


def _sp(p: Parametrization, role: str, fan_in: int, in_block: bool, s) -> Rule:
    """One scale and one rate for every tensor, whatever the size."""
    return Rule(p.router_std if role == "router" else s, decay=_no_decay(role))


def _mup(p: Parametrization, role: str, fan_in: int, in_block: bool, s) -> Rule:
    """Tensor Programs V (2203.03466), table 8, in the form of nanoGPT-mup (2505.01618, table 1, column muP)."""
    m = p.width_ratio
    if role == "hidden":
        return Rule(s / math.sqrt(m), lr=1 / m, eps=1 / m, orthogonal_lr=1 / math.sqrt(m))
    if role == "router":  # an output of a fixed number of experts: as the readout, with its divisor of width in place
        return Rule(p.router_std, eps=1 / m, forward=1 / m)
    return Rule(s, decay=_no_decay(role), eps=1 / m if in_block else 1.0)


def _completep(p: Parametrization, role: str, fan_in: int, in_block: bool, s) -> Rule:
    """CompleteP (2505.01618), table 1: muP in width, residual branches scaled by m_L^-alpha in depth."""
    rule, alpha = _mup(p, role, fan_in, in_block, s), p.cfg.parametrization.depth_alpha
    if not in_block:
        return rule
    depth = p.depth_ratio ** (alpha - 1)
    eps = rule.eps * p.depth_ratio**-alpha
    return rule._replace(lr=rule.lr * depth, eps=eps, orthogonal_lr=rule.orthogonal_lr * depth)


def _minicpm(p: Parametrization, role: str, fan_in: int, in_block: bool, s) -> Rule:
    """MiniCPM (2404.06395), table 7 as its training code reads it: embedding and norms at the full rate, decay on all.

    Its decay is coupled to the tensor's rate, so that of hidden matrices shrinks with width.
    """
    m = p.width_ratio
    if role == "hidden":
        return Rule(s / math.sqrt(m), lr=1 / m, decay=1 / m, orthogonal_lr=1 / math.sqrt(m))
    if role == "router":
        return Rule(p.router_std, forward=1 / m)
    return Rule(s)


def _umup(p: Parametrization, role: str, fan_in: int, in_block: bool, s) -> Rule:
    """u-muP (2407.17465), table 2: unit variance everywhere, scale in the forward pass. Ignores init_std.

    The output's backward scale is left at its forward one: Adam does not see a factor common to all gradients.
    """
    depth = 1 / math.sqrt(2 * p.cfg.num_layers) if in_block else 1.0
    match role:
        case "embed":
            return Rule(1.0, lr=1 / math.sqrt(p.cfg.width))
        case "hidden":
            return Rule(1.0, lr=depth / math.sqrt(fan_in), forward=1 / math.sqrt(fan_in), orthogonal_lr=depth)
        case "router":
            return Rule(1.0, lr=depth, forward=1 / fan_in)
        case "readout":
            return Rule(1.0)
    return Rule(1.0, lr=depth, decay=0.0)


_SCHEMES = {"sp": _sp, "mup": _mup, "completep": _completep, "minicpm": _minicpm, "umup": _umup}
