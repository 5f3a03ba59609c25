"""slmjax's own training step behind the protocol of `slmjax/bench/plain_jax.py`, for `peers.py`.

python slmjax_peer.py serve JSON        JSON: {"shape": {...}, "loss_chunk": 0, "devices": 1}
"""

import json
import sys

from slmjax import environment


def make_trainer(shape, loss_chunk: int, num_devices: int):
    from slmjax import bench, config, program, sharding

    sizes = shape._asdict()
    changes = {f"model.{key}": sizes[key] for key in sizes if key not in ("seq_len", "batch_size")}
    changes |= {"data.seq_len": shape.seq_len, "train.batch_size": shape.batch_size, "data.packing": "concat"}
    cfg = config.override(
        config.RunConfig(), changes | {"objective.loss_chunk": loss_chunk, "mesh.steps_per_dispatch": 4}
    )
    mesh = sharding.make_mesh(cfg.mesh, num_devices)
    dispatch = bench.trainer(program.build(cfg, num_devices, mesh), cfg)

    def train(num_steps: int) -> None:
        assert num_steps % (4 * num_devices) == 0
        dispatch(num_steps // (4 * num_devices))

    return train


def main() -> None:
    given = json.loads(sys.argv[2])
    environment.prepare(given["devices"])
    from slmjax.bench import plain_jax

    plain_jax.serve(
        lambda shape: make_trainer(shape, given["loss_chunk"], given["devices"]),
        plain_jax.Shape(**given["shape"]),
        multiple=4 * given["devices"],
    )


if __name__ == "__main__":
    main()
