"""A decoder block: attention and a feed-forward or experts, each in a pre-norm residual branch."""

import flax.linen as nn

from slmjax.config import ModelConfig
from slmjax.models.layers import Attention, Memory, Mlp, RMSNorm, mean_abs
from slmjax.models.moe import Moe


class Block(nn.Module):
    """BTD → BTD, the mean absolute activation of each part, the experts' Sums or None, and the Memory or None."""

    cfg: ModelConfig
    attention: str  # global | window
    feed_forward: str  # mlp | moe

    @nn.compact
    def __call__(self, x_BTD, segments_BT, attention: str, scales, memory: Memory | None = None):
        """`scales` are ((skip, branch) of attention, (skip, branch) of feed-forward), floats or traced scalars."""
        cfg, sums = self.cfg, None
        y_BTD = RMSNorm(cfg, name="attention_norm")(x_BTD)
        attend = Attention(cfg, self.attention, name="attention")
        attention_BTD, memory = attend(y_BTD, segments_BT, attention, memory)
        x_BTD = _add(x_BTD, attention_BTD, scales[0])
        y_BTD = RMSNorm(cfg, name="mlp_norm")(x_BTD)
        if self.feed_forward == "moe":
            mlp_BTD, sums = Moe(cfg, name="moe")(y_BTD, attention)
        else:
            mlp_BTD = Mlp(cfg, cfg.mlp_width, name="mlp")(y_BTD)
        x_BTD = _add(x_BTD, mlp_BTD, scales[1])
        seen = {"attention": mean_abs(attention_BTD), "mlp": mean_abs(mlp_BTD), "residual": mean_abs(x_BTD)}
        return x_BTD, seen, sums, memory


def _add(skip, branch, scales):
    skip_scale, branch_scale = scales
    if not (isinstance(skip_scale, float) and skip_scale == 1.0):
        skip = skip_scale * skip
    return skip + (branch if isinstance(branch_scale, float) and branch_scale == 1.0 else branch_scale * branch)
