"""How fast a config trains on this machine: against plain JAX, against the machine's own matmul peak, and how soon.

Everything is measured in one call and in turn, a slice of each at a time, because machines are shared and clocks move:
a ratio is the median of the ratios of neighbouring slices. `plain_jax` is the baseline.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from slmjax import config, devices, ladder, optim, program, sharding, train
from slmjax.bench import plain_jax
from slmjax.config import RunConfig
from slmjax.program import Program
from slmjax.study import Run

ROUNDS = 7
BASELINE, DENSE, CAUSAL = "plain JAX", "slmjax, dense", "slmjax, next token"


BUILTIN = {  # width, layers, head width, positions, sequences, vocabulary, loss chunk
    "a": (64, 4, 16, 256, 16, 4096, 1024),
    "s": (64, 2, 16, 128, 8, 512, 0),
    "e": (256, 2, 32, 256, 16, 1024, 1024),
    "m": (256, 4, 32, 128, 16, 4096, 1024),
}


def builtin(name: str) -> RunConfig:
    """The shapes of benchmarks/README.md: `a`, where the vocabulary dominates, `s`, a wind tunnel's cell, `e`, 8
    experts of which 2 are active, and `m`, masked diffusion."""
    width, layers, head_dim, seq_len, batch, vocab, chunk = BUILTIN[name]
    changes = {"data.seq_len": seq_len, "data.packing": "concat", "train.batch_size": batch, "model.vocab_size": vocab}
    shape = ladder.shape(width, layers, head_dim)
    if name == "e":
        shape |= ladder.mixture(shape["model.mlp_width"], 8, 2)
        shape["mesh.steps_per_dispatch"] = 2  # a step takes a quarter of a second on two cores
    if name == "m":
        shape |= {"mesh.steps_per_dispatch": 2, "objective.name": "masked_diffusion"}
    return config.override(RunConfig(), shape | changes | {"objective.loss_chunk": chunk})


@dataclass(frozen=True)
class Row:
    """One way of training, measured. Ratios are against the baseline in the same call."""

    what: str
    tokens_per_s: float
    ms_per_step: float
    ratio: float
    gflop_per_s: float  # by closed form (`ladder.flops_per_token`)
    peak_share: float  # of the matmul peak
    compile_cold_s: float | None = None  # trace and compile the step, nothing in the cache
    compile_warm_s: float | None = None  # the same from the persistent cache
    step_mb: float | None = None  # device memory of one step, arguments included, as XLA plans it
    mfu: float | None = None  # of the data sheet's peak, where it is known
    dense_ratio: float | None = None  # of a model with experts, against the dense one of equal active parameters
    causal_ratio: float | None = None  # of an objective that hides tokens, against next_token on the same model


@dataclass(frozen=True)
class Result:
    name: str
    device: str
    num_devices: int
    cores: int
    huge_pages: bool
    peak_gflop_per_s: float  # the machine's best matrix product
    peak_by: str
    rows: list[Row]

    def to_json(self) -> dict:
        return asdict(self)


# --- ways of training ------------------------------------------------------------------------------------------------


def trainer(prog: Program, cfg: RunConfig) -> Callable[[int], None]:
    """`train(num_dispatches)` on random tokens, as the training loop does it: one dispatch in flight."""
    P, K, B, T = prog.num_members, cfg.mesh.steps_per_dispatch, cfg.train.batch_size, cfg.data.seq_len
    state = prog.init(np.arange(P, dtype=np.uint32), np.full(P, cfg.model.parametrization.init_std, np.float32))
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (P, K, B, T + 1), np.int32)
    segments, counts = np.ones_like(tokens), np.full(P, K, np.int32)
    hyper = jax.tree.map(lambda value: np.full((P, K), value), optim.hyper_at(cfg, 1.0))

    def run(num_dispatches: int) -> None:
        nonlocal state
        before = None
        for _ in range(num_dispatches):
            state, metrics = prog.train(state, tokens, segments, hyper, counts)
            if before is not None:
                np.asarray(before.loss)
            before = metrics
        jax.block_until_ready(before)

    return run


def plain_shape(cfg: RunConfig) -> plain_jax.Shape:
    """The baseline's sizes for a config; what else the config asks of the model, the baseline leaves out. For experts
    it is the dense model of equal active parameters."""
    model = config.to_dict(ladder.dense_twin(cfg.model) if cfg.model.moe.num_experts else cfg.model)
    sizes = {key: model[key] for key in plain_jax.Shape._fields if key in model}
    return plain_jax.Shape(**sizes, seq_len=cfg.data.seq_len, batch_size=cfg.train.batch_size)


class Worker:
    """Another process that trains when asked to: `plain_jax.serve` and its like."""

    def __init__(self, command: list, shape: plain_jax.Shape, env: dict | None = None, **options):
        spec = json.dumps({"shape": shape._asdict(), **options})
        self.process = subprocess.Popen(
            [*map(str, command), "serve", spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.tokens_per_step = shape.tokens_per_step
        self.first_step_s = self._answer()["first_step_s"]
        for _ in range(2):  # the first answer of a process only tells it its own speed
            self.rate(0.2)

    def rate(self, seconds: float) -> float:
        """Tokens per second over about `seconds` of training."""
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer["steps"] * self.tokens_per_step / answer["seconds"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.stdin.close()
        self.process.wait()


def plain_environment() -> dict[str, str]:
    """This process's environment without what slmjax adds to it: JAX as it comes, on all cores."""
    ours = ("GLIBC_TUNABLES", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")
    return {key: value for key, value in os.environ.items() if key not in ours}


def timed(run: Callable[[int], object], tokens: int) -> Callable[[float], float]:
    """`rate(seconds)` → tokens per second of a `run(count)` that handles `tokens` per count."""
    run(1)  # compiles
    began = time.perf_counter()
    run(2)
    per_s = 2 / (time.perf_counter() - began)

    def rate(seconds: float) -> float:
        nonlocal per_s
        count = max(1, round(seconds * per_s))
        began = time.perf_counter()
        run(count)
        per_s = count / (time.perf_counter() - began)
        return per_s * tokens

    return rate


def interleaved(rates: dict[str, Callable[[float], float]], seconds: float) -> dict[str, list[float]]:
    """Tokens per second of each, once a round, in turn; `seconds` in all."""
    slice_s = seconds / ROUNDS / len(rates)
    measured = {name: [] for name in rates}
    for _ in range(ROUNDS):
        for name, rate in rates.items():
            measured[name].append(rate(slice_s))
    return measured


def median_ratio(values: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


# --- compiling -------------------------------------------------------------------------------------------------------


def compile_seconds(step, *args) -> tuple[float, float, float]:
    """(cold, warm, megabytes): seconds to trace and compile a jitted step with an empty and a filled cache."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    names += ("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    seconds, plans = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, value in zip(names, (folder, True, 0, -1), strict=True):
                jax.config.update(name, value)
            for _ in range(2):
                jax.clear_caches()
                compilation_cache.reset_cache()
                began = time.perf_counter()
                compiled = step.lower(*args).compile()
                seconds.append(time.perf_counter() - began)
                plans.append(compiled.memory_analysis())
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
    plan = plans[0]
    used = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return *seconds, used / 1e6


def train_arguments(prog: Program, cfg: RunConfig) -> tuple:
    """Abstract arguments of `prog.train`."""
    P, K, B, T = prog.num_members, cfg.mesh.steps_per_dispatch, cfg.train.batch_size, cfg.data.seq_len
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct((P, *a.shape), a.dtype), prog.abstract_member)
    tokens = jax.ShapeDtypeStruct((P, K, B, T + 1), np.int32)
    hyper = jax.tree.map(lambda a: jax.ShapeDtypeStruct((P, K), a.dtype), optim.hyper_at(cfg, 1.0))
    return state, tokens, tokens, hyper, jax.ShapeDtypeStruct((P,), np.int32)


# --- the machine -----------------------------------------------------------------------------------------------------


def matmul_peak(cfg: RunConfig) -> tuple[float, str]:
    """(GFLOP/s of all devices used, by what): the best of square products and the model's own, in its dtype.

    On CPU also by NumPy's BLAS: XLA's own products do not reach what the cores can do.
    """
    on_cpu = jax.default_backend() == "cpu"
    N, D, F, V = cfg.train.batch_size * cfg.data.seq_len, cfg.model.width, cfg.model.mlp_width, cfg.model.vocab_size
    squares = (512, 1024, 2048) if on_cpu else (4096, 8192, 16384)
    found = []
    for m, k, n in [*((size,) * 3 for size in squares), (N, D, F), (N, D, V)]:
        a, b = jnp.ones((m, k), cfg.model.dtype), jnp.ones((k, n), cfg.model.dtype)
        product = jax.jit(jnp.matmul)
        found.append((_gflop_per_s(lambda a=a, b=b, f=product: f(a, b), m * k * n), f"JAX {m}x{k}x{n}"))
        if on_cpu:
            c, d = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
            found.append((_gflop_per_s(lambda c=c, d=d: c @ d, m * k * n), f"NumPy {m}x{k}x{n}"))
    gflop_per_s, by = max(found)
    return (gflop_per_s, by) if on_cpu else (gflop_per_s * len(jax.devices()), by)


def _gflop_per_s(product: Callable, multiplications: int) -> float:
    """The best of five runs of 50 ms or so each."""
    jax.block_until_ready(product())
    began = time.perf_counter()
    jax.block_until_ready(product())
    count = max(1, round(0.05 / (time.perf_counter() - began)))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready([product() for _ in range(count)])  # all: they may end in any order
        best = min(best, (time.perf_counter() - began) / count)
    return 2e-9 * multiplications / best


# --- all of it -------------------------------------------------------------------------------------------------------


def _programs(cfg: RunConfig) -> dict[str, Program]:
    """A resolved config's ways of training, and what its experts or its objective are compared with."""
    programs = {"slmjax train": train.build_program([Run(cfg)])}
    if jax.default_backend() == "cpu" and len(jax.devices()) > 1:
        alone = sharding.make_mesh(config.override(cfg, {"mesh.data": 1}).mesh, devices=jax.devices()[:1])
        programs["slmjax, one device"] = program.build(cfg, 1, alone)
        count = len(jax.devices())
        spread = [Run(config.override(cfg, {"train.seed": seed})) for seed in range(count)]
        programs[f"slmjax, {count} members spread"] = train.build_program(spread, count)
    if cfg.model.moe.num_experts:
        dense = dataclasses.replace(cfg, model=ladder.dense_twin(cfg.model))
        programs[DENSE] = train.build_program([Run(dense)])
        capacity = config.override(cfg, {"model.moe.dispatch": "capacity"})
        programs["slmjax, capacity one-hot"] = train.build_program([Run(capacity)])
    if cfg.objective.name in config.MASKING:
        objective = config.to_dict(config.ObjectiveConfig(loss_chunk=cfg.objective.loss_chunk))
        causal = config.override(cfg, {"objective": objective, "model.mask_row": "auto"})
        programs[CAUSAL] = train.build_program([Run(causal)])
        if "slmjax, one device" in programs:
            programs[f"{CAUSAL}, one device"] = program.build(causal, 1, alone)
    return programs


def measure(cfg: RunConfig, name: str, seconds: float) -> Result:
    """Measures a config for about `seconds`, compilation apart."""
    cfg = ladder.resolved(cfg)
    on_cpu, programs = jax.default_backend() == "cpu", _programs(cfg)
    shape = plain_shape(cfg)
    compiled = {what: compile_seconds(prog.train, *train_arguments(prog, cfg)) for what, prog in programs.items()}
    step, params, opt_state = plain_jax.make_step(shape)
    tokens = jax.ShapeDtypeStruct((shape.batch_size, shape.seq_len + 1), np.int32)
    compiled[BASELINE] = compile_seconds(step, params, opt_state, tokens)
    peak, by = matmul_peak(cfg)
    rates = {}
    with contextlib.ExitStack() as stack:
        if on_cpu:
            command = [sys.executable, Path(plain_jax.__file__)]
            rates[BASELINE] = stack.enter_context(Worker(command, shape, plain_environment())).rate
        else:  # two processes do not share an accelerator's memory well, and there is nothing to set for it
            rates[BASELINE] = timed(plain_jax.make_trainer(shape), shape.tokens_per_step)
        for what, prog in programs.items():
            per_dispatch = prog.num_members * cfg.mesh.steps_per_dispatch * shape.tokens_per_step
            rates[what] = timed(trainer(prog, cfg), per_dispatch)
        measured = interleaved(rates, seconds)
    flops = ladder.run_flops_per_token(cfg)["with_head"]
    sheet = devices.peak_flops(jax.devices()[0].device_kind)

    def causal_of(what: str) -> str:
        """Autoregression on as many devices."""
        alone = f"{CAUSAL}, one device"
        return alone if what.endswith("one device") and alone in measured else CAUSAL

    def row(what: str, speeds: list[float]) -> Row:
        speed = statistics.median(speeds)
        gflop_per_s = 1e-9 * flops * speed
        return Row(
            what,
            speed,
            1e3 * shape.tokens_per_step / speed,
            median_ratio(speeds, measured[BASELINE]),
            gflop_per_s,
            gflop_per_s / peak,
            *compiled[what],
            sheet and flops * speed / (sheet * len(jax.devices())),
            median_ratio(speeds, measured[DENSE]) if DENSE in measured else None,
            median_ratio(speeds, measured[causal_of(what)]) if CAUSAL in measured else None,
        )

    return Result(
        name,
        jax.devices()[0].device_kind,
        len(jax.devices()),
        os.cpu_count() or 1,
        "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""),
        peak,
        by,
        [row(what, speeds) for what, speeds in measured.items()],
    )
