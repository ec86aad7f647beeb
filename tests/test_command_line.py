"""The command line: what it prints, what it writes, and what it says when something is wrong."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_mml.command_line import main
from keras_mml.layers import Conv2DMML, DenseMML, TokenEmbedding

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.Sequential([keras.Input((20,)), DenseMML(16, activation="relu"), DenseMML(3)]).save("latent.keras")
    keras.Sequential([keras.Input((20,)), keras.layers.Dense(3)]).save("float.keras")
    return tmp_path


def as_json(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info(capsys):
    result = as_json(capsys, "info", "latent.keras")
    assert result["bytes"] == Path("latent.keras").stat().st_size
    assert result["total"]["parameters"] == 20 * 16 + 16 + 16 * 3 + 3 and result["total"]["ternary_parameters"] == 20 * 16 + 16 * 3
    assert main(["info", "latent.keras"]) == 0
    assert "DenseMML" in capsys.readouterr().out
    keras.Sequential([keras.Input((None, None, 1)), Conv2DMML(2, 3)]).save("open.keras")
    assert main(["info", "open.keras"]) == 1
    assert "open.keras: the model takes inputs of shape (None, None, 1). Say which with --shape" in capsys.readouterr().err
    assert as_json(capsys, "info", "open.keras", "--shape", "8,8,1")["total"]["ternary_parameters"] == 18


def test_pack_writes_the_same_model_and_replaces_only_by_force(capsys, folder):
    result = as_json(capsys, "pack", "latent.keras", "packed.keras")
    assert result["bytes_after"] == Path("packed.keras").stat().st_size < result["bytes_before"]
    x = np.random.default_rng(0).normal(size=(5, 20)).astype("float32")
    latent, packed = (keras.saving.load_model(f"{name}.keras", compile=False) for name in ("latent", "packed"))
    np.testing.assert_allclose(packed.predict(x, verbose=0), latent.predict(x, verbose=0), atol=1e-4)
    before = Path("packed.keras").read_bytes()
    assert main(["pack", "float.keras", "packed.keras", "--force"]) == 1
    assert main(["pack", "latent.keras", "packed.keras"]) == 1
    assert "exists already. Add --force" in capsys.readouterr().err
    assert Path("packed.keras").read_bytes() == before
    assert main(["pack", "latent.keras", "packed.keras", "--force"]) == 0
    assert sorted(os.listdir(folder)) == ["float.keras", "latent.keras", "packed.keras"]  # nothing is left over


def test_bench(capsys):
    result = as_json(capsys, "bench", "latent.keras", "--batch", "1,4", "--seconds", "0.01")
    assert [row["batch"] for row in result["seconds"]] == [1, 4] and not result["packed"]
    assert all(row["model"] > 0 and row["packed"] > 0 for row in result["seconds"])
    assert "packed" not in as_json(capsys, "bench", "float.keras", "--batch", "1", "--seconds", "0")["seconds"][0]
    main(["pack", "latent.keras", "packed.keras"])
    capsys.readouterr()
    assert as_json(capsys, "bench", "packed.keras", "--batch", "1", "--seconds", "0.01")["packed"]
    keras.Sequential([keras.Input((None,), dtype="int32"), TokenEmbedding(9, 5, 4), DenseMML(2)]).save("tokens.keras")
    assert as_json(capsys, "bench", "tokens.keras", "--batch", "2", "--seconds", "0.01", "--shape", "6")["seconds"][0]["packed"] > 0
    assert main(["bench", "tokens.keras"]) == 1
    assert "Say which with --shape" in capsys.readouterr().err


@keras.saving.register_keras_serializable()
class Own(keras.layers.Layer):
    pass


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["info", "none.keras"], "none.keras: No such file or directory"),
        (["info", "."], ".: Is a directory"),
        (["info", "latent.keras", "--shape", "9"], "latent.keras: "),
        (["bench", "latent.keras", "--shape", "9"], "latent.keras: "),
        (["bench", "two.keras", "--shape", "9"], "two.keras: --shape is for models with one input, and this one has 2"),
        (["info", "text.keras"], "text.keras: not a .keras file"),
        (["info", "half.keras"], "half.keras: not a .keras file"),
        (["info", "empty.keras"], "empty.keras: could not be loaded"),
        (["info", "own.keras"], "own.keras: could not be loaded"),
        (["info", "lambda.keras"], "lambda.keras: could not be loaded"),
        (["pack", "float.keras", "out.keras"], "has no layer that can be packed"),
        (["pack", "latent.keras", "out.h5"], "out.h5: the name of the new file must end in .keras"),
        (["pack", "latent.keras", "no/such/out.keras"], "no/such/out.keras: could not be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, capsys):
    Path("text.keras").write_text("not a model")
    Path("half.keras").write_bytes(Path("latent.keras").read_bytes()[:2000])
    with zipfile.ZipFile("empty.keras", "w") as file:
        file.writestr("metadata.json", "{}")
    keras.Sequential([keras.Input((4,)), Own()]).save("own.keras")
    keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x)]).save("lambda.keras")
    keras.saving.get_custom_objects().pop("Custom>Own", None)
    inputs = [keras.Input((None, 4)), keras.Input((None, 4))]
    keras.Model(inputs, DenseMML(2)(keras.layers.Add()(inputs))).save("two.keras")
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "Exception encountered" not in captured.err
    assert message in captured.err and captured.err.startswith("keras-mml: ") and captured.err.count("\n") == 1
    assert not captured.out and not Path("out.keras").exists()


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "arguments",
    [[], ["unknown"], ["pack", "one.keras"], ["bench", "x.keras", "--batch", "0"], ["info", "x", "--shape", "a"],
     ["bench", "x", "--seconds", "nan"], ["bench", "x", "--seconds", "-1"]],
)  # fmt: skip
def test_commands_that_cannot_be_understood_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "usage: keras-mml" in capsys.readouterr().err


@pytest.mark.any_backend
def test_the_command_works_without_a_chosen_backend(folder):
    "As a process of its own, as whoever just installed the package runs it."
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    environment.update(PYTHONPATH=str(ROOT), KERAS_HOME=str(folder / "home"))
    code = "import sys; from keras_mml.command_line import main; sys.exit(main())"
    environment["PYTHONIOENCODING"] = "ascii"  # which has no ×
    for arguments, expected in ((["info", "latent.keras"], 0), (["info", "none.keras"], 1), (["--help"], 0), (["--version"], 0)):
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=folder)
        assert result.returncode == expected and "Traceback" not in result.stderr, result.stderr[-1000:]


@pytest.mark.with_tensorflow
def test_models_of_texts_cannot_be_measured(capsys):
    texts = keras.Input((1,), dtype="string")
    numbers = keras.layers.StringLookup(vocabulary=["a", "b"])(texts)
    keras.Model(texts, DenseMML(2)(keras.layers.Embedding(3, 4)(numbers))).save("texts.keras")
    assert main(["bench", "texts.keras"]) == 1
    assert "takes texts" in capsys.readouterr().err


def test_foreign_archives_and_classes_are_named_in_one_short_line(capsys, tmp_path):
    keras.saving.register_keras_serializable("tests")(Own)
    keras.Sequential([keras.Input((4,)), Own()]).save(tmp_path / "own.keras")
    keras.saving.get_custom_objects().pop("tests>Own", None)
    (tmp_path / "renamed.zip").write_bytes((tmp_path / "own.keras").read_bytes())
    keras2 = '{"class_name": "Sequential", "config": {"name": "a"}}'
    for name, config in [("null", "null"), ("list", "[1]"), ("broken", "{"), ("keras2", keras2)]:
        with zipfile.ZipFile(tmp_path / f"{name}.keras", "w") as file:
            file.writestr("config.json", config)
    with zipfile.ZipFile(tmp_path / "nothing.keras", "w"):
        pass
    expected = {
        "own.keras": "could not be loaded. Could not locate class 'Own', which is not of Keras or keras_mml. In Python, import it and use",
        "renamed.zip": "the name of the file of a model must end in .keras",
        **dict.fromkeys(
            ["null.keras", "list.keras", "broken.keras", "keras2.keras", "nothing.keras"],
            "could not be loaded. It is damaged, or no model that Keras 3 saved",
        ),
    }  # fmt: skip
    for name, message in expected.items():
        for command in (["info"], ["bench"]):
            assert main([*command, str(tmp_path / name)]) == 1
            assert capsys.readouterr().err.startswith(f"keras-mml: {tmp_path / name}: {message}")


def test_what_cannot_be_measured_is_named_with_its_file(capsys, tmp_path):
    keras.Sequential([keras.layers.Dense(2)]).save(tmp_path / "open.keras")
    assert main(["bench", str(tmp_path / "open.keras")]) == 1
    assert capsys.readouterr().err.startswith(f"keras-mml: {tmp_path / 'open.keras'}: The model does not say what its inputs are")
