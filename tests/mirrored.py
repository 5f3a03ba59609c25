"""Training with a mirror in a store of `object_store`, as tests of it do."""

import time
from pathlib import Path

import runs

from slmjax import paths
from slmjax.mirror import lease
from slmjax.mirror.session import Mirror
from slmjax.progress import Progress

URL = "gs://b/root/s"
FEATURES = {"log.checkpoint_every": 4, "log.eval_every": 8, "optim.ema_decay": 0.9}
LEASES = f"/{lease.FOLDER}/"
NEVER = 1e6  # seconds between pushes of the thread: these tests push themselves


class Pushing(Progress):
    """Pushes after every dispatch."""

    def __init__(self, mirror: Mirror):
        super().__init__(quiet=True)
        self.mirror = mirror

    def update(self, members, num_waiting):
        self.mirror._push()


def mirror_of(folder: Path, *chosen, **settings) -> Mirror:
    settings = {"every_s": NEVER, "ttl_s": 0.2, "final_s": 0.0} | settings
    return Mirror(list(chosen), folder, paths.as_path(URL), **settings)


def train_mirrored(folder: Path, *chosen, **settings):
    with mirror_of(folder, *chosen, **settings) as mirror:
        return runs.train_here(folder, *chosen, progress=Pushing(mirror))


def dead(objects: dict[str, bytes]) -> dict[str, bytes]:
    """What a killed process leaves, its lease run out."""
    return {name: content for name, content in objects.items() if LEASES not in name}


def put(bucket, objects: dict[str, bytes]) -> None:
    bucket.objects = dict(objects)
    bucket.times = dict.fromkeys(objects, time.time())
    bucket.requests.clear()


def unpack(objects: dict[str, bytes], folder: Path) -> Path:
    for name, content in objects.items():
        path = folder / name.removeprefix("b/root/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / "s"
