"""The same model and the same work as `slmjax/bench/plain_jax.py`, as one would write it in PyTorch.

python torch_peer.py serve JSON         JSON: {"shape": {...}, "compile": false}
python torch_peer.py train JSON         as plain_jax.py; both protocols are described there
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def rms_norm(x, gain):
    return F.rms_norm(x, gain.shape, gain, 1e-5)


class Layer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        D, H, K, C, M = (shape[k] for k in ("width", "num_heads", "num_kv_heads", "head_dim", "mlp_width"))
        self.heads, self.kv_heads = H, K
        sizes = {"query": (D, H * C), "key": (D, K * C), "value": (D, K * C), "out": (H * C, D)}
        sizes |= {"gate": (D, M), "up": (D, M), "down": (M, D)}
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(0.02 * torch.randn(size)))
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(D)) for _ in range(2))

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        y = rms_norm(x, self.norm1)
        q, k, v = (
            (y @ weight).view(B, T, heads, -1).transpose(1, 2)
            for weight, heads in ((self.query, self.heads), (self.key, self.kv_heads), (self.value, self.kv_heads))
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + y.transpose(1, 2).reshape(B, T, -1) @ self.out
        y = rms_norm(x, self.norm2)
        return x + (F.silu(y @ self.gate) * (y @ self.up)) @ self.down


def rotate(x, cos, sin):
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Model(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.embed = nn.Parameter(0.02 * torch.randn(shape["vocab_size"], shape["width"]))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape["num_layers"]))
        self.norm = nn.Parameter(torch.ones(shape["width"]))
        c = shape["head_dim"] // 2
        angle = torch.arange(shape["seq_len"])[:, None] * 10000.0 ** (-torch.arange(c) / c)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens):
        x = F.embedding(tokens[:, :-1], self.embed)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = rms_norm(x, self.norm) @ self.embed.T
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make_step(shape, compile=False, lr=1e-3, seed=0):
    """step(tokens_BT1 int64) → loss, and the model."""
    torch.manual_seed(seed)
    model = Model(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss_of = torch.compile(model) if compile else model

    def step(tokens):
        loss = loss_of(tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step, model


def serve(shape, compile=False):
    began = time.perf_counter()
    step, _ = make_step(shape, compile)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, shape["vocab_size"], (8, shape["batch_size"], shape["seq_len"] + 1))
    batches = torch.from_numpy(rows)

    def train(num_steps):
        for i in range(num_steps):
            loss = step(batches[i % len(batches)])
        return float(loss)

    train(1)
    first_step_s = time.perf_counter() - began
    print(json.dumps({"first_step_s": first_step_s}), flush=True)
    steps_per_s = 0.0
    for line in sys.stdin:
        num_steps = max(1, round(float(line) * steps_per_s))
        began = time.perf_counter()
        loss = train(num_steps)
        seconds = time.perf_counter() - began
        steps_per_s = num_steps / seconds
        print(json.dumps({"steps": num_steps, "seconds": seconds, "loss": loss}), flush=True)


def train_run(shape, steps, lr, seed, tokens, out, compile=False):
    step, model = make_step(shape, compile, lr, seed)
    rows = np.load(tokens, mmap_mode="r")
    order = np.random.default_rng(seed).permutation(len(rows))
    B = shape["batch_size"]
    for i in range(steps):
        chosen = order[np.arange(i * B, (i + 1) * B) % len(order)]
        loss = step(torch.from_numpy(rows[chosen].astype(np.int64)))
        if (i + 1) % 10 == 0:
            print(i + 1, float(loss), flush=True)
    torch.save(model.state_dict(), out)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    (serve if sys.argv[1] == "serve" else train_run)(**given)
