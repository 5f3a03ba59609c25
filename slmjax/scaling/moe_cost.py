"""Parameters and training FLOPs of the fine-grained mixtures of Krajewski et al. 2024 (arXiv 2402.07871, section 5):
width 64 per block, experts in every block, dense MLPs of four widths, no embedding and no head."""

WIDTH_PER_BLOCK = 64
ACTIVE_FLOPS, ROUTER_FLOPS = 6, 14  # c_f and c_r: per active weight and per router output and width, forward and back


def num_blocks(active_params: float) -> float:
    """Blocks (not rounded) of the model with 12 width^2 active parameters in each."""
    return (active_params / (12 * WIDTH_PER_BLOCK**2)) ** (1 / 3)


def total_params(blocks: float, experts: float) -> float:
    """All parameters; `experts` is the expansion rate E, whatever the granularity."""
    return (WIDTH_PER_BLOCK * blocks) ** 2 * (8 * experts + 4) * blocks


def training_flops(blocks: float, experts: float, granularity: float, tokens: float) -> float:
    """Training FLOPs: the router's share grows with experts times granularity."""
    width = WIDTH_PER_BLOCK * blocks
    return (12 * width**2 * ACTIVE_FLOPS + width * experts * granularity * ROUTER_FLOPS) * tokens * blocks
