"""The baseline of every ratio: a small language model as one would write it in JAX without a framework.

Jitted step, layers unrolled, `jax.nn.dot_product_attention`, all logits at once, `optax.adamw` behind a global-norm
clip, one step a call, one process a run. It imports nothing from slmjax, and runs as a script in a process of its own,
with JAX's settings as they come:

    python plain_jax.py serve JSON          reads seconds from standard input, a line each; answers what it trained
    python plain_jax.py train JSON          one whole run: {"steps", "lr", "seed", "tokens": a .npy file, "out"}
"""

import functools
import json
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Shape(NamedTuple):
    """Pre-norm decoder with RMSNorm, rotary embeddings, grouped queries, SwiGLU, tied embeddings."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    seq_len: int
    batch_size: int
    dtype: str = "float32"

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


def init(shape: Shape, key) -> dict:
    D, H, K, C, F = shape.width, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.mlp_width
    sizes = {"query": (D, H, C), "key": (D, K, C), "value": (D, K, C), "out": (H, C, D)}
    sizes |= {"gate": (D, F), "up": (D, F), "down": (F, D)}
    keys = iter(jax.random.split(key, 1 + shape.num_layers * len(sizes)))

    def normal(*size):
        return 0.02 * jax.random.normal(next(keys), size)

    def layer():
        return {name: normal(*size) for name, size in sizes.items()} | {"norm1": jnp.ones(D), "norm2": jnp.ones(D)}

    layers = [layer() for _ in range(shape.num_layers)]
    return {"embed": normal(shape.vocab_size, D), "layers": layers, "norm": jnp.ones(D)}


def rms_norm(x, gain):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5) * gain).astype(x.dtype)


def rotate(x_BTHC):
    T, C = x_BTHC.shape[1], x_BTHC.shape[-1]
    angle_Tc = jnp.arange(T)[:, None] * 10000.0 ** (-jnp.arange(C // 2) / (C // 2))
    cos, sin = (f(angle_Tc)[:, None].astype(x_BTHC.dtype) for f in (jnp.cos, jnp.sin))
    left, right = jnp.split(x_BTHC, 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def logits(shape: Shape, params, tokens_BT):
    params = jax.tree.map(lambda a: a.astype(shape.dtype), params)
    x_BTD = params["embed"][tokens_BT]
    for layer in params["layers"]:
        y_BTD = rms_norm(x_BTD, layer["norm1"])
        q, k, v = (jnp.einsum("btd,dhc->bthc", y_BTD, layer[name]) for name in ("query", "key", "value"))
        y_BTHC = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x_BTD += jnp.einsum("bthc,hcd->btd", y_BTHC, layer["out"])
        y_BTD = rms_norm(x_BTD, layer["norm2"])
        x_BTD += (jax.nn.silu(y_BTD @ layer["gate"]) * (y_BTD @ layer["up"])) @ layer["down"]
    return (rms_norm(x_BTD, params["norm"]) @ params["embed"].T).astype(jnp.float32)


def make_step(shape: Shape, lr: float = 1e-3, seed: int = 0):
    """(jitted (params, opt_state, tokens_BT1) → (params, opt_state, loss), params, opt_state)."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr, b2=0.95, weight_decay=0.1))

    def loss_of(params, tokens_BT1):
        logits_BTV = logits(shape, params, tokens_BT1[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT1[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens_BT1):
        loss, grads = jax.value_and_grad(loss_of)(params, tokens_BT1)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = jax.jit(functools.partial(init, shape))(jax.random.key(seed))
    return step, params, jax.jit(optimizer.init)(params)


def make_trainer(shape: Shape):
    """`train(num_steps) → loss` on random tokens."""
    step, params, opt_state = make_step(shape)
    rng = np.random.default_rng(0)
    batches = rng.integers(0, shape.vocab_size, (8, shape.batch_size, shape.seq_len + 1), np.int32)

    def train(num_steps: int) -> float:
        nonlocal params, opt_state
        for i in range(num_steps):
            params, opt_state, loss = step(params, opt_state, batches[i % len(batches)])
        return float(loss)

    return train


def serve(make, shape: Shape, multiple: int = 1) -> None:
    """Answers requests for seconds of training, so that another process can measure this one in turn with others.

    make: shape → train(num_steps) → loss, which is only asked for multiples of `multiple`.
    """
    began = time.perf_counter()
    train = make(shape)
    train(multiple)
    first_step_s = time.perf_counter() - began
    print(json.dumps({"first_step_s": first_step_s}), flush=True)
    steps_per_s = 0.0
    for line in sys.stdin:
        num_steps = multiple * max(1, round(float(line) * steps_per_s / multiple))
        began = time.perf_counter()
        loss = train(num_steps)
        seconds = time.perf_counter() - began
        steps_per_s = num_steps / seconds
        print(json.dumps({"steps": num_steps, "seconds": seconds, "loss": loss}), flush=True)


def train_run(shape: Shape, steps: int, lr: float, seed: int, tokens: str, out: str) -> None:
    """One run of a sweep: its losses as lines, its final parameters in `out`."""
    step, params, opt_state = make_step(shape, lr, seed)
    rows_NT1 = np.load(tokens, mmap_mode="r")
    order = np.random.default_rng(seed).permutation(len(rows_NT1))
    for i in range(steps):
        rows = order[np.arange(i * shape.batch_size, (i + 1) * shape.batch_size) % len(order)]
        params, opt_state, loss = step(params, opt_state, rows_NT1[rows])
        if (i + 1) % 10 == 0:
            print(i + 1, float(loss), flush=True)
    np.savez(out, *jax.tree.leaves(jax.device_get(params)))


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    shape = Shape(**given.pop("shape"))
    serve(make_trainer, shape) if sys.argv[1] == "serve" else train_run(shape, **given)
