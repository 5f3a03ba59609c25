"""What a study will train and cost, before anything runs. No JAX, no data: closed forms of the configs."""

from dataclasses import asdict, dataclass
from typing import Any

from slmjax import ladder, study
from slmjax.study import Study


@dataclass(frozen=True)
class PlannedRun:
    run_id: str
    tags: dict[str, Any]
    parent: str | None
    N: int  # non-embedding parameters that a token passes
    N_total: int  # those of all experts
    D: int  # tokens the finished model has seen
    tokens_per_param: float
    C: int  # FLOPs of those tokens, each by the model that it trained
    own_flops: int  # what this run adds: a branch starts from its trunk, an upcycled run from a dense one
    own_tokens: int
    steps: int
    first_step: int
    program_id: str


@dataclass(frozen=True)
class Plan:
    """programs: how many are compiled. branched_flops: what trunks and branches cost, of own_flops.

    separate_flops: what the branches would cost, each trained from its first step. most_state_bytes: weights, gradients
    and optimizer state of the run that has most of them.
    """

    name: str
    runs: list[PlannedRun]
    programs: int
    own_flops: int
    own_tokens: int
    branched_flops: int
    separate_flops: int
    most_state_bytes: int

    def to_json(self) -> dict:
        return asdict(self)

    def seconds(self, flops_per_s: float | None = None, tokens_per_s: float | None = None) -> float | None:
        """Training time at a measured speed."""
        if flops_per_s:
            return self.own_flops / flops_per_s
        return self.own_tokens / tokens_per_s if tokens_per_s else None


def make_plan(source: Study) -> Plan:
    by_id = {run.run_id: run for run in source.runs}
    runs = [_planned(run, by_id) for run in source.runs]
    trunks = {run.parent for run in runs}
    return Plan(
        name=source.name,
        runs=runs,
        programs=len({run.program_id for run in runs}),
        own_flops=sum(run.own_flops for run in runs),
        own_tokens=sum(run.own_tokens for run in runs),
        branched_flops=sum(run.own_flops for run in runs if run.parent or run.run_id in trunks),
        separate_flops=sum(run.C for run in runs if run.parent and run.run_id not in trunks),
        most_state_bytes=max((ladder.state_bytes(run.config)["total"] for run in source.runs), default=0),
    )


def _planned(run: study.Run, by_id: dict[str, study.Run]) -> PlannedRun:
    cfg = run.config
    counts, D = ladder.run_counts(cfg), ladder.num_tokens(cfg)
    N = counts.active_non_embedding
    return PlannedRun(
        run_id=run.run_id,
        tags=dict(run.tags),
        parent=run.parent,
        N=N,
        N_total=counts.non_embedding,
        D=D,
        tokens_per_param=D / N,
        C=study.total_flops(run, by_id),
        own_flops=study.run_flops(run),
        own_tokens=study.trained_tokens(run),
        steps=cfg.train.steps,
        first_step=run.first_step,
        program_id=run.program_id,
    )
