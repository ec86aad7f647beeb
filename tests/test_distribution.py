"""Training on several devices and processes: eight devices that jax simulates, and two processes of torch, against one.

Everything runs in processes of their own, which tests/distributed.py describes; several checks share one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from cases import lengths

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.any_backend]  # the processes choose their backends
if os.environ.get("KERAS_BACKEND", "torch") != "torch":
    pytest.skip("The processes choose their backends; torch's run tests them.", allow_module_level=True)
pytest.importorskip("jax")

WORKER = str(ROOT / "tests" / "distributed.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Eight devices share the threads of one processor: more threads than cores, and one step at a time, or they may wait for each other.
EIGHT = dict(XLA_FLAGS="--xla_force_host_platform_device_count=8", NPROC="64", JAX_CPU_ENABLE_ASYNC_DISPATCH="false")
EIGHT |= dict(JAX_DISABLE_MOST_OPTIMIZATIONS="1")


def start(backend, *command, **environment):
    "Start a process, or two under torchrun."
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"OMP_NUM_THREADS": "1", **(EIGHT if backend == "jax" else {}), **environment}
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": paths, **environment}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, status=0, timeout=600):
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        raise
    assert process.returncode == status, output
    return output


def both(task, folder):
    "Run a task on jax and on torch at the same time."
    for process in [start("jax", WORKER, task, folder), start("torch", *TORCHRUN, WORKER, task, folder)]:
        finish(process)


def arrays(path):
    file = np.load(path)
    return [file[name] for name in file.files]


def difference(path, other):
    "The median and the largest difference of two files of arrays."
    pairs = zip(arrays(path), arrays(other), strict=True)
    differences = np.concatenate([np.abs(a.astype("float64") - b).ravel() for a, b in pairs])
    return np.median(differences), differences.max()


@pytest.mark.parametrize("number", lengths(1, 2))
@pytest.mark.parametrize("backend, ways", [pytest.param("jax", ["data", "model"], marks=pytest.mark.slow), ("torch", ["ddp", "fsdp"])])
def test_every_layer_trains_as_on_one_device(backend, ways, number, tmp_path):
    "Sums are taken in another order. Where that decides how an input or a weight is rounded, a layer parts by a little; others do not."
    finish(start(backend, *(TORCHRUN if backend == "torch" else []), WORKER, "train_layers", tmp_path))
    one = json.loads((tmp_path / "one.json").read_text())
    for way in ways[-number:]:
        result = json.loads((tmp_path / f"{way}.json").read_text())
        errors = {name: np.abs(np.array(losses) / one["losses"][name] - 1).max() for name, losses in result["losses"].items()}
        assert np.median(list(errors.values())) < 2e-6 and max(errors.values()) < 5e-3, (way, errors)
        median, largest = difference(tmp_path / f"{way}.npz", tmp_path / "one.npz")
        assert median < 1e-6 and largest < 2e-2, (way, median, largest)
        cut = {path: (shape, part) for path, shape, part in result["parts"] if path.endswith(("kernel", "embeddings"))}
        assert len(cut) > 30
        devices = {"data": 1, "ddp": 1, "model": 4, "fsdp": 2}[way]
        for path, (shape, part) in cut.items():
            is_cut = np.prod(part) * devices == np.prod(shape)
            does_not_divide = part == shape and shape[-1] == 2 if way == "model" else way == "fsdp" and shape[0] % 2
            assert is_cut or does_not_divide, (way, path, shape, part)
    last = json.loads((tmp_path / "last.json").read_text())
    assert len(last["packed"]) == len(one["losses"]) - 1 > 15  # without their sum
    for name, rows in last["packed"].items():
        assert np.median(rows) < 1e-5, (name, rows)
    for gamma, whole, _ in last["scales"]:
        assert abs(gamma / whole - 1) < 1e-5
    if backend == "jax":
        assert len(last["scales"]) > 15 and any(abs(part / whole - 1) > 1e-3 for _, whole, part in last["scales"])


def test_fsdp_with_other_optimizers_constraints_and_shared_layers(tmp_path):
    finish(start("torch", *TORCHRUN, WORKER, "corner_cases", tmp_path))
    assert (tmp_path / "corner_cases.json").exists()


@pytest.mark.parametrize("number", lengths(16, 36))
def test_each_checkpoint_goes_on_in_each_way(number, tmp_path):
    "Six ways to write one, six to go on, or four and four: all end where a run without a break does, the optimizer's moments included."
    both("save_each", tmp_path)
    both("go_on_from_each", tmp_path)
    continued = sorted(tmp_path.glob("*-*-*-*.npz"))
    assert len(continued) == number
    for path in continued:
        complete = tmp_path / f"{path.stem.split('-')[0]}-complete.npz"  # initial weights depend on the backend
        median, largest = difference(path, complete)
        assert median < 1e-5 and largest < 1e-2, (path.stem, median, largest)


@pytest.fixture
def script(tmp_path, monkeypatch):
    "The script that the tutorial shows, in a folder with a model to start from."
    cells = [cell.source for cell in nbformat.read(ROOT / "nbs" / "tutorials" / "scale-out.ipynb", 4).cells]
    (source,) = (cell.split("\n", 1)[1] for cell in cells if cell.startswith("%%writefile scale_out.py"))
    (tmp_path / "scale_out.py").write_text(source)
    (make,) = (cell[cell.index("keras.utils.set_random_seed") :] for cell in cells if 'distribution.save(model, "start.keras")' in cell)
    monkeypatch.chdir(tmp_path)
    exec("import keras\nfrom keras_mml import distribution, layers\n" + make, {})
    return tmp_path


@pytest.mark.slow  # in a short run, the tutorial about scaling out does it
def test_a_killed_worker_of_torchrun(script):
    "torchrun starts the job again, which goes on from the last checkpoint and ends where an undisturbed one does, bit for bit."
    for name, more in (("killed", ["--kill-in", "1"]), ("undisturbed", [])):
        (script / f"{name}.keras").write_bytes((script / "start.keras").read_bytes())
        command = [*TORCHRUN, "--max-restarts", "1", script / "scale_out.py", script / f"{name}.keras", "--how", "sharded", *more]
        output = finish(start("torch", *command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
        assert ("epochs 2 to 3" if more else "epochs 1 to 3") in output
        assert ("exitcode: -9" in output) == bool(more)
    assert same_state(script / "killed.keras", script / "undisturbed.keras")
    assert not list(script.glob("~*"))


@pytest.mark.slow
def test_a_killed_process_of_jax(script):
    command = [script / "scale_out.py", script / "start.keras", "--how", "model"]
    (script / "killed.keras").write_bytes((script / "start.keras").read_bytes())
    finish(start("jax", *command))
    command[1] = script / "killed.keras"
    finish(start("jax", *command, "--kill-in", "1"), status=-9)
    assert "epochs 2 to 3" in finish(start("jax", *command))
    assert same_state(script / "killed.keras", script / "start.keras")


def same_state(path, other):
    import keras

    import keras_mml  # noqa: F401

    first, second = ([*m.variables, *m.optimizer.variables] for m in map(keras.saving.load_model, (path, other)))
    pairs = [[keras.ops.convert_to_numpy(v) for v in pair] for pair in zip(first, second, strict=True)]
    return all(np.array_equal(a, b) for a, b in pairs)


def test_what_is_refused():
    import keras

    from keras_mml import distribution

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    for function in (distribution.data_parallel, distribution.fully_shard):
        with pytest.raises(ValueError, match="torchrun"):
            function(model)
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], [f"cpu:{i}" for i in range(8)])
    with pytest.raises(ValueError, match="KERAS_BACKEND=jax"):
        distribution.ModelParallel(distribution.layout_map(mesh))
    with pytest.raises(ValueError, match="no axis 'columns'"):
        distribution.layout_map(mesh, "columns")


def test_a_model_that_was_not_compiled_is_saved(tmp_path):
    import keras

    from keras_mml import distribution

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    distribution.save(model, tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").count_params() == model.count_params()
    with pytest.raises(ValueError, match="ends in `.keras`"):
        distribution.save(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]
