"""Checkpoints: bit-exact round trips, every damaged byte noticed, every kill survived, nothing outside the directory
touched."""

import json
import logging
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from slmjax import checkpoint, digests
from slmjax.checkpoint import Checkpointer, CheckpointError

LAYOUTS = ("packed", "tree")


class State(NamedTuple):
    step: object
    params: object
    opt_state: object
    ema: object = None


def numpy_state(seed):
    """All dtypes of a run, empty and scalar leaves, and the bit patterns that value comparisons lose: -0.0, NaN
    payloads, inf."""
    rng = np.random.default_rng(seed)
    odd = np.array([0x80000000, 0x7FC00123, 0xFFC00001, 0x7F800000, 1], np.uint32).view(np.float32)
    params = {
        "embed": rng.normal(size=(16, 8)).astype(np.float32),
        "mlp": {"up": rng.normal(size=(2, 8, 4)).astype(jnp.bfloat16)},
    }
    opt_state = (
        State(np.int32(seed), {"odd": odd, "none": np.zeros((0, 3), np.float32)}, ()),
        {"minus_zero": np.full((4, 4), -0.0, np.float32), "zero": np.zeros(3, jnp.bfloat16)},
        rng.integers(0, 2**32, size=5, dtype=np.uint32),
    )
    return State(np.int32(seed), params, opt_state)


def shapes(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_bits_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def listing(root):
    """{relative path: bytes, or None for a folder} of everything below root."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in pathlib.Path(root).rglob("*")}


def step_dir(root, step):
    return pathlib.Path(root) / f"step-{step:08d}"


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    if request.param == "tree":
        monkeypatch.setattr(checkpoint, "PACK_LIMIT_BYTES", -1)
    return request.param


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """{layout: folder holding steps 1 and 2}. Tests damage copies."""
    folders = {}
    for name in LAYOUTS:
        folders[name] = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as m, Checkpointer(folders[name]) as saver:
            m.setattr(checkpoint, "PACK_LIMIT_BYTES", {"packed": 2**20, "tree": -1}[name])
            for step in (1, 2):
                saver.save(step, numpy_state(step), {"tokens": 100 * step})
    return folders


@pytest.fixture
def damaged(two_steps, tmp_path):
    """copy(layout) -> a fresh folder with steps 1 and 2, to be damaged."""

    def copy(name="packed"):
        folder = tmp_path / f"copy{len(os.listdir(tmp_path))}"
        shutil.copytree(two_steps[name], folder)
        return folder

    return copy


def assert_falls_back(folder, caplog, named):
    """Restoring gives step 1 bit-equal, moves step 2 to quarantine whole, and logs `named`."""
    before = listing(step_dir(folder, 2))
    caplog.clear()
    with Checkpointer(folder) as ckpt:
        step, state, meta = ckpt.restore(shapes(numpy_state(0)))
        assert (step, meta, ckpt.steps()) == (1, {"tokens": 100}, [1])
    assert_bits_equal(state, numpy_state(1))
    assert named in caplog.text
    assert listing(folder / "quarantine" / "step-00000002") == before


# ---- round trips ---------------------------------------------------------------------------------


def test_round_trip_is_bit_exact(layout, tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    meta = {"phase": "stable", "tokens": 10**12, "fingerprint": "ab", "nested": [1, None, 0.1]}
    numpy, device = numpy_state(3), jax.tree.map(jnp.asarray, numpy_state(4))
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(3, numpy, meta)
        ckpt.save(4, device, {})
        step, state, found = ckpt.restore(shapes(numpy), step=3)
        assert (step, found) == (3, meta) and all(type(x) is np.ndarray for x in jax.tree.leaves(state))
        assert_bits_equal(state, numpy)
        step, state, found = ckpt.restore(shapes(device, sharding))
        assert (step, found) == (4, {}) and all(x.sharding == sharding for x in jax.tree.leaves(state))
        assert_bits_equal(state, device)
    assert json.loads(json.loads((step_dir(tmp_path, 4) / "digests.json").read_text())["body"])["layout"] == layout


def test_saved_values_are_those_at_the_call(layout, tmp_path, monkeypatch):
    """The loop donates and overwrites its arrays while the save is still being written."""
    go, digest_files = threading.Event(), checkpoint.digest_files
    monkeypatch.setattr(checkpoint, "digest_files", lambda root: go.wait(30) and digest_files(root))
    numpy = numpy_state(1)
    state = (jnp.arange(300_000, dtype=jnp.float32), numpy)
    update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state, {})
        for leaf in (update(state[0]), *jax.tree.leaves(numpy)):
            if isinstance(leaf, np.ndarray):
                leaf[...] = 7
        assert ckpt.steps() == []  # `save` did not wait for the background half, and counts nothing before its end
        go.set()
        ckpt.wait()
        assert ckpt.steps() == [1]
        _, (x, restored), _ = ckpt.restore((jax.ShapeDtypeStruct((300_000,), jnp.float32), shapes(numpy)))
    np.testing.assert_array_equal(x, np.arange(300_000, dtype=np.float32))
    assert_bits_equal(restored, numpy_state(1))


def test_restored_arrays_survive_donation(layout, tmp_path):
    abstract = shapes(np.zeros(300_000, np.float32), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, np.arange(300_000, dtype=np.float32), {})
        x, y = (ckpt.restore(abstract)[1] for _ in range(2))
        x = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
        np.testing.assert_array_equal(y, np.arange(300_000, dtype=np.float32))
        np.testing.assert_array_equal(x, np.arange(300_000, dtype=np.float32) + 1)


def test_any_mesh_restores_any_other(layout, tmp_path):
    if jax.device_count() != 4:
        env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
        here = f"{__file__}::{test_any_mesh_restores_any_other.__name__}[{layout}]"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--noconftest", "-o", "addopts=", here],
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
        return
    w_DF = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    value = {"w": w_DF, "b": w_DF[0].astype(jnp.bfloat16), "step": np.int32(7)}
    meshes = [
        ((4, 1), P("data", "model")),
        ((2, 2), P("data", "model")),
        ((1, 4), P("model", "data")),
        ((2, 2), P()),
        ((1, 1), P()),
    ]
    placements = []
    for shape, spec in meshes:
        mesh = jax.make_mesh(
            shape, ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[: shape[0] * shape[1]]
        )
        specs = {"w": spec, "b": P("data"), "step": P()}
        placements.append({name: NamedSharding(mesh, s) for name, s in specs.items()})
    with Checkpointer(tmp_path, keep=len(meshes)) as ckpt:
        for step, placement in enumerate(placements):
            ckpt.save(step, jax.device_put(value, placement), {})
        for step in range(len(meshes)):
            for placement in placements:
                abstract = {
                    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement[name]) for name, x in value.items()
                }
                _, state, _ = ckpt.restore(abstract, step=step)
                assert {name: x.sharding for name, x in state.items()} == placement
                assert_bits_equal(state, value)


# ---- which steps ---------------------------------------------------------------------------------


def test_pinned_steps_and_the_newest_stay(tmp_path):
    state = {"w": np.zeros(3, np.float32)}
    with Checkpointer(tmp_path, keep=2) as ckpt:
        for step in (10, 20, 30, 40):
            ckpt.save(step, state, {}, pinned=step in (10, 40))
    with Checkpointer(tmp_path, keep=2) as ckpt:  # a later attempt knows the pins from the disk
        ckpt.save(50, state, {})
        ckpt.save(60, state, {})
        ckpt.wait()
        assert ckpt.steps() == [10, 40, 50, 60] and ckpt.latest() == 60
    assert sorted(os.listdir(tmp_path)) == [f"step-{s:08d}" for s in (10, 40, 50, 60)]


def test_nothing_saved_is_none_and_creates_nothing(tmp_path):
    with Checkpointer(tmp_path / "new") as ckpt:
        assert ckpt.restore(shapes(numpy_state(0))) is None and ckpt.steps() == [] and ckpt.latest() is None
    assert os.listdir(tmp_path) == []


def test_branching_names_the_available_steps(damaged):
    with Checkpointer(damaged()) as ckpt:
        assert ckpt.restore(shapes(numpy_state(0)), step=1)[0] == 1
        with pytest.raises(CheckpointError, match=r"no step 3 .*\[1, 2\]"):
            ckpt.restore(shapes(numpy_state(0)), step=3)


def test_branching_from_a_damaged_step_refuses_and_touches_nothing(damaged):
    folder = damaged()
    (step_dir(folder, 2) / "state/_METADATA").unlink()
    before = listing(folder)
    with Checkpointer(folder) as ckpt, pytest.raises(CheckpointError, match=r"step 2 .*_METADATA is missing"):
        ckpt.restore(shapes(numpy_state(0)), step=2)
    assert listing(folder) == before


def test_a_directory_only_grows(damaged):
    with Checkpointer(damaged()) as ckpt:
        for step in (2, 1, -1):
            with pytest.raises(ValueError, match=f"step {step} is not after the newest checkpoint 2"):
                ckpt.save(step, numpy_state(0), {})
        ckpt.save(3, numpy_state(3), {})
        ckpt.wait()
        assert ckpt.steps() == [2, 3]


def test_foreign_entries_are_ignored_and_kept(damaged):
    folder = damaged()
    foreign = ["notes.txt", "12", "step-2", "step-000000009", "step-latest", "latest"]
    for name in foreign[1:-1]:
        (folder / name).mkdir()
        (folder / name / "digests.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    (folder / "latest").symlink_to("step-00000001")
    (step_dir(folder, 2) / "state" / ".DS_Store").write_text("")
    (folder / ".tmp-step-00000007" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    with Checkpointer(folder) as ckpt:
        assert ckpt.steps() == [1, 2] and ckpt.restore(shapes(numpy_state(0)))[0] == 2
        ckpt.save(3, numpy_state(3), {})
    assert sorted(os.listdir(folder)) == sorted([*foreign, "step-00000002", "step-00000003"])


# ---- damage --------------------------------------------------------------------------------------


def damage(path, kind, rng):
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "zeroed":
        path.write_bytes(bytes(len(data)))
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["flipped", "zeroed", "truncated", "missing"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_damage_to_any_file_is_found(name, kind, two_steps, damaged, caplog):
    rng = random.Random(f"{name} {kind}")
    files = [p.relative_to(two_steps[name]) for p in step_dir(two_steps[name], 2).rglob("*") if p.is_file()]
    assert len(files) >= 6
    for file in files:
        if (two_steps[name] / file).stat().st_size == 0 and kind != "missing":
            continue
        folder = damaged(name)
        damage(folder / file, kind, rng)
        assert_falls_back(folder, caplog, str(file))
        assert kind != "truncated" or file.name == "digests.json" or "bytes, not" in caplog.text


def test_no_good_step_stops_the_run_every_time(damaged):
    """Also on the second launch, when quarantine holds everything: an automatic restart must not begin at step 0."""
    folder = damaged()
    shutil.rmtree(step_dir(folder, 1))
    (step_dir(folder, 2) / "digests.json").unlink()
    for _ in range(2):
        with Checkpointer(folder) as ckpt, pytest.raises(CheckpointError, match=r"no checkpoint in .* can be trusted"):
            ckpt.restore(shapes(numpy_state(0)))
    assert os.listdir(folder) == ["quarantine"]


def test_a_step_number_lost_to_damage_can_be_saved_again(damaged):
    folder = damaged()
    (step_dir(folder, 2) / "digests.json").unlink()
    with Checkpointer(folder) as ckpt:
        ckpt.save(2, numpy_state(5), {})
        assert_bits_equal(ckpt.restore(shapes(numpy_state(0)))[1], numpy_state(5))
    assert os.listdir(folder / "quarantine") == ["step-00000002"]


def rewrite_manifest(step_path, **changes):
    """What a careful forger or another version would write: digests.json with a valid digest of its own."""
    manifest = digests.read_manifest(step_path) | changes
    digests.write_manifest(step_path, manifest)


def test_newer_format_is_refused_not_quarantined(damaged):
    folder = damaged()
    rewrite_manifest(step_dir(folder, 2), format=digests.FORMAT + 1)
    before = listing(folder)
    with Checkpointer(folder) as ckpt, pytest.raises(CheckpointError, match="format 2, this slmjax reads up to 1"):
        ckpt.restore(shapes(numpy_state(0)))
    assert listing(folder) == before


def test_nothing_outside_the_directory_is_read_or_moved(damaged, two_steps, tmp_path, caplog):
    outside = tmp_path / "outside"
    shutil.copytree(step_dir(two_steps["packed"], 2), outside)
    before = listing(outside)

    folder = damaged()  # the step itself is a link
    shutil.rmtree(step_dir(folder, 2))
    step_dir(folder, 2).symlink_to(outside)
    assert_falls_back(folder, caplog, "leads out of the run directory")

    for inner in ("state", "state/bytes/0"):  # a folder or a file in it is a link
        folder = damaged()
        target = step_dir(folder, 2) / inner
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        target.symlink_to(outside / inner)
        assert_falls_back(folder, caplog, "leads out of the step")

    folder = damaged()  # digests.json names a file elsewhere
    name = f"../../../{outside.name}/state/_METADATA"
    data = (outside / "state/_METADATA").read_bytes()
    rewrite_manifest(step_dir(folder, 2), files={name: [len(data), digests._digest(data)]})
    assert_falls_back(folder, caplog, "leads out of the step")

    folder = damaged()  # step 1 copied over step 2
    shutil.rmtree(step_dir(folder, 2))
    shutil.copytree(step_dir(folder, 1), step_dir(folder, 2))
    assert_falls_back(folder, caplog, "holds step 1")
    assert listing(outside) == before


# ---- refusals ------------------------------------------------------------------------------------


def test_another_tree_is_refused_by_name(damaged):
    state = numpy_state(0)
    grown = state._replace(params=state.params | {"embed": np.zeros((16, 9), np.float32)})
    halved = state._replace(params=state.params | {"embed": np.zeros((16, 8), jnp.bfloat16)})
    more = state._replace(ema={"embed": np.zeros(2, np.float32)})
    less = state._replace(params={"embed": state.params["embed"]})
    with Checkpointer(damaged()) as ckpt:
        for wanted, message in [
            (grown, r"params/embed: in the checkpoint float32\[16, 8\], wanted float32\[16, 9\]"),
            (halved, r"params/embed: in the checkpoint float32\[16, 8\], wanted bfloat16\[16, 8\]"),
            (more, r"ema/embed: not in the checkpoint, wanted float32\[2\]"),
            (less, r"params/mlp/up: in the checkpoint bfloat16\[2, 8, 4\], not wanted"),
        ]:
            with pytest.raises(ValueError, match=message):
                ckpt.restore(shapes(wanted))
        assert ckpt.steps() == [1, 2]  # the caller's mistake is no damage


def test_bad_input_is_refused_at_the_call(tmp_path):
    w = np.zeros(2, np.float32)
    with Checkpointer(tmp_path / "new") as ckpt:
        for state, message in [
            ({"lr": 0.1}, "lr is float"),
            ({"o": np.array([None])}, "o is ndarray object"),
            ({"rng": jax.random.key(0)}, "rng is .*key_data"),
            ({"a/b": w, "a": {"b": w}}, "two leaves are named a/b"),
        ]:
            with pytest.raises(ValueError, match=message):
                ckpt.save(1, state, {})
        with pytest.raises(ValueError):
            ckpt.save(1, {"w": w}, {"loss": float("nan")})
        with pytest.raises(TypeError):
            ckpt.save(1, {"w": w}, {"array": w})
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="mount the bucket"):
        Checkpointer("gs://bucket/run")


@pytest.mark.parametrize("async_save", [True, False])
def test_a_failed_save_is_reported_and_survived(layout, async_save, tmp_path):
    """A full disk, played by the file-size limit of this process."""
    state = {"w": np.frombuffer(np.random.default_rng(0).bytes(1_200_000), np.float32)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path, async_save=async_save) as ckpt:
        ckpt.save(1, state, {})
        ckpt.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
            with pytest.raises(CheckpointError, match=r"saving step 2 .* failed .*complete steps: \[1\]"):
                ckpt.save(2, state, {})
                ckpt.save(3, state, {})  # the latest moment a background failure may come to light
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == ["step-00000001"]  # its space is free again
        assert_bits_equal(ckpt.restore(shapes(state))[1], state)
        ckpt.save(3, state, {})  # space is back: the same instance goes on
        ckpt.wait()
        assert ckpt.steps() == [1, 3]


# ---- kills ---------------------------------------------------------------------------------------

# Each trial forks a process that resumes, checks what it finds, and saves (and deletes) until it is killed: at its n-th
# file system call at a place, as seen by Python's audit events, or after a random time, perhaps inside Orbax's writes.
KILL_TRIALS = """
    import os, pathlib, random, signal, sys, time
    import numpy as np
    from slmjax.checkpoint import Checkpointer
    folder, layout, trials = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    from slmjax import checkpoint
    checkpoint.PACK_LIMIT_BYTES = {"packed": 2**20, "tree": -1}[layout]
    acknowledged = folder.parent / "acknowledged"
    acknowledged.write_text("0")

    def state(step):
        return {"w": np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32), "step": np.int32(step)}

    def attempt(saves, kill_at=None):
        calls = 0
        def count(event, args):
            nonlocal calls
            files = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
            if kill_at and event in files and str(folder) in str(args[0]) and kill_at[0] in str(args[0]):
                calls += 1
                if calls == kill_at[1]:
                    os.kill(os.getpid(), signal.SIGKILL)
        ckpt = Checkpointer(folder)
        found = ckpt.restore(state(0))
        step = found[0] if found else 0
        assert step >= int(acknowledged.read_text()), (step, acknowledged.read_text())
        if found:
            assert all(found[1][k].tobytes() == v.tobytes() for k, v in state(step).items())
            assert found[2] == {"step": step}
        assert not (folder / "quarantine").exists()
        sys.addaudithook(count)
        for step in range(step + 1, step + 1 + saves):
            ckpt.save(step, state(step), {"step": step})
            published = ckpt.latest() or 0
            if published > int(acknowledged.read_text()):
                (folder.parent / "new").write_text(str(published))
                os.rename(folder.parent / "new", acknowledged)
        ckpt.wait()
        assert len(os.listdir(folder)) == 2, os.listdir(folder)

    PLACES = ("digests.json", "delete-", "/state", "")
    rng = random.Random(0)
    for trial in range(trials):
        place = PLACES[trial // 2 % len(PLACES)]
        kill_at = (place, rng.randrange(1, 9)) if trial % 2 else None
        child = os.fork()
        if child == 0:
            try:
                attempt(150, kill_at)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if kill_at is None:
            time.sleep(rng.uniform(0.2, 0.6))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), f"trial {trial} failed"
    attempt(8)
    print(max(Checkpointer(folder).steps()))
"""


@pytest.mark.parametrize("name", LAYOUTS)
def test_kills_lose_nothing_published(name, tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(checkpoint.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL_TRIALS), tmp_path / "ckpt", name, "12"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) >= 16, "the trials died before they saved anything"


def test_orbax_noise_is_filtered_but_not_its_warnings(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"w": np.zeros(2, np.float32)}, {})
    assert "OCDBT" not in caplog.text
    logging.getLogger("absl").warning("a real one")
    assert "a real one" in caplog.text
