"""Before JAX starts: four CPU devices, no silent rank promotion, one persistent compile cache for every test run."""

import os
import pathlib
import random

CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(pathlib.Path.home() / ".cache" / "slmjax" / "jax")
# One thread of OpenBLAS: more of them spin while they wait for each other, on cores that other workers could use.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# In the environment too, so that the processes some tests start share the cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/goldens from what the code does now")
    parser.addoption("--seed", type=int, help="the seed of tests that draw one, to repeat a failure")


def pytest_configure(config):
    if "gpu" not in config.getoption("markexpr", "").replace("not gpu", ""):
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_compilation_cache_dir", CACHE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Forgets compiled programs between modules before there are too many: XLA maps memory for each CPU program several
    times, Linux allows a process 65,530 mappings, and past them the next compilation aborts it."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()


@pytest.fixture
def seed(request):
    """Drawn anew for every test; a failure shows it, and `--seed` repeats it."""
    chosen = request.config.getoption("--seed")
    chosen = random.SystemRandom().randrange(2**31) if chosen is None else chosen
    print(f"seed {chosen}: repeat with --seed={chosen}")
    return chosen


@pytest.fixture
def scaling_data():
    """The folder of public scaling-law tables; a test that reads them is skipped where they are not."""
    beside = pathlib.Path(__file__).parents[2] / "shared" / "scaling_data"
    folder = pathlib.Path(os.environ.get("SLMJAX_SCALING_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no public tables in {folder}; SLMJAX_SCALING_DATA names their folder")
    return folder


@pytest.fixture
def golden(request):
    """golden(name, text) compares `text` with tests/goldens/name, or writes it there under --update-goldens."""

    def compare(name: str, text: str) -> None:
        path = pathlib.Path(__file__).parent / "goldens" / name
        if request.config.getoption("--update-goldens"):
            path.write_text(text)
        assert path.exists(), f"{path} does not exist; run pytest --update-goldens and read what it writes"
        assert text == path.read_text(), f"{path} changed; if that is meant, run pytest --update-goldens"

    return compare
