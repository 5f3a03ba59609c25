"""ParallelBench in small: what decoding several tokens at once costs a trained masked-diffusion model (2510.04767).

A model is trained on each task of `data.waiting_line`, then fills responses with k tokens a call. Where a response's
tokens are independent given the prompt, no k costs anything; of shuffle, a calibrated model that fills all n at once is
right with the chance of n independent draws, n! / n^n.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from slmjax.check.training import run_config, train_and_load
from slmjax.data import waiting_line
from slmjax.decoding import ordered, parallel_bench
from slmjax.decoding.parallel_bench import Score
from slmjax.study import Run


class Row(NamedTuple):
    task: str
    per_call: int
    score: Score
    ideal: float | None  # accuracy of perfect marginals; None where it has no closed form

    @property
    def holds(self) -> bool:
        """Within four standard errors of perfect marginals; on tasks with one response, above 95%."""
        if self.ideal is None:
            return True
        if self.ideal == 1.0:
            return self.score.accuracy > (0.95 if _one_response(self.task) else 0.9)
        return abs(self.score.accuracy - self.ideal) < 4 * self.score.accuracy_se


def _one_response(spec: str) -> bool:
    return waiting_line.parse(spec)[0].num_responses == 1


def measure(
    tasks: list[str], num_items: int, steps: int, folder: Path, seed: int = 0, num_rows: int = 1024
) -> list[Row]:
    """Accuracy at one token a call, half of the response, and all of it, drawn at random places."""
    rows = []
    for task in tasks:
        spec = f"line:{task}:{num_items}:{seed}"
        line, _ = waiting_line.parse(spec)
        changes = {"objective.name": "masked_diffusion", "objective.prompt": "shown", "train.seed": seed}
        changes["objective.prompt_end"] = line.separator
        model = train_and_load(Run(run_config(spec, line.row_len, steps, changes)), folder)
        for per_call in sorted({1, line.response_len // 2, line.response_len}):
            decode = partial(ordered.decode, order="random", per_call=per_call, temperature=1.0, seed=seed)
            score = parallel_bench.evaluate(model.denoiser(), decode, spec, mask_id=model.mask_id, num_rows=num_rows)
            try:
                ideal = parallel_bench.ideal_accuracy(line, per_call)
            except ValueError:  # insert_random and remove_random have none beyond one a call
                ideal = None
            rows.append(Row(spec, per_call, score, ideal))
    return rows
