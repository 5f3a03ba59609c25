"""Random denoisers for the equalities of decoding: deterministic functions of the tokens alone, in float64 NumPy.

Every row has matrices of its own and products of its own, so that a batch of any size gives the same bits. PAD
contributes nothing.
"""

from typing import NamedTuple

import numpy as np

from slmjax.denoiser import PAD

T, V, MASK = 24, 12, 12
DIGITS = 3  # tokens of the prompt by which a row of `many` names its denoiser
SHARPNESS = (0.5, 1.0, 2.0, 4.0)  # factors of the logits, from nearly flat to nearly decided


class Weights(NamedTuple):
    """Of one denoiser, or of B of them with a leading axis."""

    embed_WD: np.ndarray  # of the vocabulary, the mask, and PAD, which is zeros and [-1]
    mix_TT: np.ndarray
    place_TD: np.ndarray
    head_DV: np.ndarray


def draw(seed: int, sharpness: float, vocab: int = V, width: int = 16, length: int = 64) -> Weights:
    rng = np.random.default_rng(seed)
    embed_WD = np.concatenate([rng.normal(size=(vocab + 1, width)), np.zeros((1, width))])
    distance_TT = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    mix_TT = rng.normal(size=(length, length)) * np.exp(-distance_TT / 3)
    place_TD = rng.normal(size=(length, width))
    return Weights(embed_WD, mix_TT, place_TD, sharpness * rng.normal(size=(width, vocab)))


def log_softmax(logits_BTV):
    logits_BTV = logits_BTV - logits_BTV.max(2, keepdims=True)
    return logits_BTV - np.log(np.exp(logits_BTV).sum(2, keepdims=True))


def log_probs(weights: Weights, tokens_BT) -> np.ndarray:
    """Position i sees the embeddings of all tokens, the mask's too, with random weights that fall with distance.

    `weights` has B of each: matmul takes the rows one by one, each with its own.
    """
    B, length = tokens_BT.shape
    x_BTD = weights.embed_WD[np.arange(B)[:, None], tokens_BT]
    h_BTD = np.tanh(weights.mix_TT[:, :length, :length] @ x_BTD + weights.place_TD[:, :length])
    return log_softmax(h_BTD @ weights.head_DV)


def random_denoiser(seed: int, sharpness: float = 2.0, vocab: int = V, width: int = 16):
    """All rows have the same weights."""
    weights = draw(seed, sharpness, vocab, width)

    def denoiser(tokens_BT):
        tokens_BT = np.asarray(tokens_BT)
        return log_probs(Weights(*(np.broadcast_to(a, (len(tokens_BT), *a.shape)) for a in weights)), tokens_BT)

    return denoiser


def many(seed: int, num: int, sharpness: tuple[float, ...] = SHARPNESS, length: int = T):
    """(denoiser, tokens_BT): `num` rows of `length` masks behind a prompt that spells which denoiser the row has.

    So hundreds of denoisers are decoded as one batch, and each still is one function of its tokens.
    """
    each = [draw(seed + b, sharpness[b % len(sharpness)], length=DIGITS + length) for b in range(num)]
    weights = Weights(*map(np.stack, zip(*each, strict=True)))
    tokens_BT = np.full((num, DIGITS + length), MASK, np.int32)
    tokens_BT[:, :DIGITS] = np.stack(np.unravel_index(np.arange(num), (V,) * DIGITS), 1)

    def denoiser(tokens_BT):
        tokens_BT = np.asarray(tokens_BT)
        rows_B = rows_of(tokens_BT)
        return log_probs(Weights(*(a[rows_B] for a in weights)), tokens_BT)

    return denoiser, tokens_BT


def rows_of(tokens_BT: np.ndarray) -> np.ndarray:
    """Which of `many` each row is, whatever has been filled in."""
    return np.ravel_multi_index(tuple(np.asarray(tokens_BT)[:, :DIGITS].T), (V,) * DIGITS)


class CallsPerRow:
    """Counts the calls in which each row of `many` still had a mask: its own calls, were it decoded alone."""

    def __init__(self, denoiser, num: int):
        self.denoiser, self.calls_B, self.num_calls, self.shapes = denoiser, np.zeros(num, int), 0, set()

    def __call__(self, tokens_BT):
        self.num_calls += 1
        self.shapes.add(np.shape(tokens_BT))
        tokens_BT = np.asarray(tokens_BT)
        self.calls_B[np.unique(rows_of(tokens_BT[(tokens_BT == MASK).any(1)]))] += 1
        return self.denoiser(tokens_BT)


def with_end(denoiser, end_id: int, bias: float = 0.0, sure: bool = True):
    """The same, but deaf to what lies behind a row's first end token after the prompt, and sure that it is end tokens.

    `bias` is added to the end token's logit. Not `sure`, it guesses tokens behind the end from those before.
    """

    def ending(tokens_BT):
        tokens_BT = np.asarray(tokens_BT)
        ended_BT = (tokens_BT == end_id) & (np.arange(tokens_BT.shape[1])[None] >= DIGITS)
        behind_BT = np.cumsum(ended_BT, 1) - ended_BT > 0
        log_probs_BTV = np.array(denoiser(np.where(behind_BT, PAD, tokens_BT)))
        log_probs_BTV[..., end_id] += bias
        log_probs_BTV -= np.log(np.exp(log_probs_BTV).sum(2, keepdims=True))
        if sure:
            log_probs_BTV[behind_BT] = np.where(np.arange(log_probs_BTV.shape[2]) == end_id, 0.0, -np.inf)
        return log_probs_BTV

    return ending


def uneven(tokens_BT: np.ndarray, seed: int) -> np.ndarray:
    """Rows of `many` with longer prompts, visible tokens among the masks, and ends of different lengths."""
    rng = np.random.default_rng(seed)
    tokens_BT = tokens_BT.copy()
    for tokens_T in tokens_BT:
        length = len(tokens_T)
        prompt, visible = rng.integers(DIGITS, length // 2), rng.random(length) < 0.2
        visible[DIGITS:prompt] = True
        visible[prompt] = False  # so that no row is without masks
        tokens_T[visible & (tokens_T == MASK)] = rng.integers(V, size=np.sum(visible & (tokens_T == MASK)))
        tokens_T[rng.integers(prompt + 1, length + 1) :] = PAD
    return tokens_BT


def planted(seed: int, num: int, length: int = T):
    """(denoiser, tokens_BT) as of `many`, whose confidence tells: each row has a secret, and each position knows its
    token the better the more of its neighbours are visible, some positions much better than others.
    """
    rng = np.random.default_rng(seed)
    width = DIGITS + length
    secret_BT = rng.integers(V, size=(num, width))
    noise_BTV = rng.normal(size=(num, width, V))
    clarity_BT = rng.uniform(0, 4, (num, width))
    near_TT = np.abs(np.subtract.outer(np.arange(width), np.arange(width))) <= 2
    _, tokens_BT = many(seed, num, length=length)

    def denoiser(tokens_BT):
        tokens_BT = np.asarray(tokens_BT)
        rows_B = rows_of(tokens_BT)
        logits_BTV = noise_BTV[rows_B]
        seen_BT = (tokens_BT != MASK) @ near_TT  # of booleans: whether any neighbour is visible
        at = np.arange(len(tokens_BT))[:, None], np.arange(width), secret_BT[rows_B]
        logits_BTV[at] += clarity_BT[rows_B] + seen_BT
        return log_softmax(logits_BTV)

    return denoiser, tokens_BT
