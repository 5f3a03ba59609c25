"""What decoding several tokens at once costs, where it can be computed: ParallelBench's waiting lines (2510.04767).

Of a task of `slmjax.data.waiting_line`: the total correlation of its response, the chance that independent draws from
perfect marginals give a valid one, the denoiser that has these marginals, and the accuracy of any denoiser and decoder.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from slmjax.data import waiting_line
from slmjax.data.waiting_line import Line
from slmjax.decoding import Decoded
from slmjax.denoiser import Denoiser


class Score(NamedTuple):
    accuracy: float  # share of rows with a valid response
    accuracy_se: float  # Agresti and Coull's, so that not even none or all of the rows are taken for certainty
    calls: int  # denoiser calls, for all rows as one batch
    row_calls: float  # rows with masks that the denoiser was shown, per row: drafts count, finished rows do not
    num_rows: int


def total_correlation(line: Line) -> float:
    """Bits by which the entropies of a response's tokens exceed that of the response, its prompt given.

    It is the Kullback-Leibler divergence from the product of perfect marginals to the truth: what drawing all tokens in
    one call must lose.
    """
    N = line.num_items
    if line.num_responses == 1:
        return 0.0
    if line.task == "shuffle":
        return N * math.log2(N) - math.log2(math.factorial(N))
    if line.task == "replace_random":
        return (N - 1) * (math.log2(N) - math.log2(N - 1))
    if line.task == "insert_random":  # before the new item, at it, after it
        marginals = [(N - j, 1, j) for j in range(N + 1)]
    else:  # remove_random: before the gap, after it
        marginals = [(N - 1 - j, j + 1) for j in range(N - 1)]
    places = sum(marginals[0])
    entropy = sum(-w / places * math.log2(w / places) for weights in marginals for w in weights if w)
    return entropy - math.log2(places)


def ideal_accuracy(line: Line, per_call: int) -> float:
    """The chance of a valid response when each call draws `per_call` tokens at random places from perfect marginals.

    Raises:
      ValueError: the task has no closed form here (insert_random, remove_random with more than one per call).
    """
    left = line.response_len
    if line.num_responses == 1 or per_call == 1:
        return 1.0
    if line.task == "shuffle":
        valid = 1.0
        while left:
            drawn = min(per_call, left)
            valid *= math.perm(left, drawn) / left**drawn
            left -= drawn
        return valid
    if line.task != "replace_random":
        raise ValueError(f"no closed form of {line.task} at {per_call} per call; simulate it with `perfect`")
    valid, unplaced = 0.0, 1.0  # unplaced: chance that no token so far is the new item
    while left:
        drawn = min(per_call, left)
        valid += unplaced * drawn / left * (1 - 1 / left) ** (drawn - 1)
        unplaced *= (1 - 1 / left) ** drawn
        left -= drawn
    return valid


def perfect(line: Line) -> Denoiser:
    """The denoiser with the true distribution of every token of the response, given the prompt and what is visible.

    Rows have no start token. What no valid response agrees with is answered as if none of the response were visible,
    but for shuffle, where a token that is still free may come.
    """

    def denoiser(tokens_BT):
        tokens_BT = np.asarray(tokens_BT)
        counts_BTV = np.zeros((*tokens_BT.shape, line.vocab_size))
        response_BR = tokens_BT[:, line.prompt_len :]
        counts_BTV[:, line.prompt_len :] = (_free_items if line.task == "shuffle" else _responses)(
            line, tokens_BT, response_BR
        )
        counts_BTV[:, : line.prompt_len, 0] = 1  # never asked for
        with np.errstate(divide="ignore"):
            return np.log(counts_BTV / counts_BTV.sum(2, keepdims=True))

    return denoiser


def evaluate(
    denoiser: Denoiser, decode: Callable[..., Decoded], spec: str, *, mask_id: int, num_rows: int = 512
) -> Score:
    """How often `decode(denoiser, tokens_BT, mask_id=...)` gives a valid response, over held-out rows of `spec`.

    `spec` is a data source line:TASK:N:SEED. All rows are one batch, since a decoder with a fixed seed would draw the
    same noise for every batch. Calls are counted around the denoiser, not by the decoder.
    """
    line, _ = waiting_line.parse(spec)
    rows_NT = waiting_line.sampler(spec, "held_out", line.row_len + 1)(np.arange(num_rows))[:, 1:]
    shown_NT = rows_NT.copy()
    shown_NT[:, line.prompt_len :] = mask_id
    calls = shown = 0

    def counted(tokens_BT):
        nonlocal calls, shown
        calls += 1
        shown += int((np.asarray(tokens_BT) == mask_id).any(1).sum())
        return denoiser(tokens_BT)

    decoded_NT = np.asarray(decode(counted, shown_NT, mask_id=mask_id).tokens_BT)
    if not np.array_equal(decoded_NT[:, : line.prompt_len], rows_NT[:, : line.prompt_len]):
        raise ValueError("the decoder changed a prompt")
    num_valid = int(waiting_line.is_valid(line, decoded_NT).sum())
    shrunk = (num_valid + 2) / (num_rows + 4)
    accuracy_se = math.sqrt(shrunk * (1 - shrunk) / (num_rows + 4))
    return Score(num_valid / num_rows, accuracy_se, calls, shown / num_rows, num_rows)


def _free_items(line: Line, tokens_BT, response_BR) -> np.ndarray:
    """[B, R, V]: 1 for every item of the line that the response does not show yet."""
    items_BN = waiting_line.source(line, tokens_BT)
    free_BN = (items_BN[:, :, None] != response_BR[:, None]).all(2)
    counts_BV = np.zeros((len(tokens_BT), line.vocab_size))
    np.put_along_axis(counts_BV, items_BN, np.where(free_BN, 1.0, 0.0), axis=1)
    none_free_B1 = ~free_BN.any(1, keepdims=True)  # then nothing is asked either
    return np.broadcast_to(np.where(none_free_B1, 1.0, counts_BV)[:, None], (*response_BR.shape, line.vocab_size))


def _responses(line: Line, tokens_BT, response_BR) -> np.ndarray:
    """[B, R, V]: how many valid responses that agree with what is visible have each token."""
    source_BS, R = waiting_line.source(line, tokens_BT), line.response_len
    if line.task == "sort":
        source_BS = np.sort(source_BS, axis=1)
    responses_BPR = source_BS[:, waiting_line.places(line)]
    possible_BP = np.ones(responses_BPR.shape[:2], bool)
    if line.indexed:
        place_B1 = tokens_BT[:, line.prompt_len - 2, None]
        possible_BP = place_B1 == np.arange(responses_BPR.shape[1])
    visible_B1R = ((response_BR >= 0) & (response_BR < line.vocab_size))[:, None]
    agrees_BP = possible_BP & ((responses_BPR == response_BR[:, None]) | ~visible_B1R).all(2)
    chosen_BP = np.where(agrees_BP.any(1, keepdims=True), agrees_BP, possible_BP)
    counts_BRV = np.zeros((len(tokens_BT), R, line.vocab_size))
    rows_B11, places_11R = np.arange(len(tokens_BT))[:, None, None], np.arange(R)
    np.add.at(counts_BRV, (rows_B11, places_11R, responses_BPR), chosen_BP[:, :, None])
    return counts_BRV
