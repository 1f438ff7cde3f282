"""What cannot be converted: the error, the culprit it names, and that nothing is published."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.actor.launch import launch
from tests.actor.test_bad_models import EXPERT, edit_config, edit_weights, truncate
from tests.convert.conftest import PROGRAMS

pytestmark = pytest.mark.slow

# name: (model, what is done to its folder, the error, what the message must contain)
FOLDERS: dict[str, tuple[str, Callable[[Path], object], str, list[str]]] = {
    "a truncated shard": ("qwen3", truncate, "ModelError", ["model.safetensors", "is the file complete?"]),
    "a missing expert": (
        "qwen3moe",
        edit_weights(lambda t: t.pop(EXPERT)),
        "ModelError",
        [f"{EXPERT} is missing"],
    ),
    "fewer layers than tensors": (
        "qwen3",
        edit_config(num_hidden_layers=3, layer_types=None),
        "ModelError",
        ["model.layers.3.", "belongs to no parameter"],
    ),
    "more layers than tensors": (
        "llama",
        edit_config(num_hidden_layers=5),
        "ModelError",
        ["model.layers.4.", "is missing"],
    ),
    "another width": (
        "llama",
        edit_config(intermediate_size=256),
        "ModelError",
        [".mlp.", "config.json asks for"],
    ),
    "other heads": (
        "qwen3",
        edit_config(num_key_value_heads=1),
        "ModelError",
        ["k_proj", "config.json asks for"],
    ),
    "an unknown architecture": (
        "qwen3",
        edit_config(architectures=["HalForCausalLM"]),
        "ModelError",
        ["HalForCausalLM", "It knows", "LlamaForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"],
    ),
    "an untied output layer that config.json ties": (
        "qwen2",
        edit_weights(lambda t: t.update({"lm_head.weight": torch.ones(512, 64)})),
        "ModelError",
        ["lm_head.weight differs from the embedding"],
    ),
    "a tensor more": (
        "llama",
        edit_weights(lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(4)})),
        "ModelError",
        ["model.layers.0.self_attn.sinks belongs to no parameter"],
    ),
    "dtypes mixed within a parameter": (
        "llama",
        edit_weights(lambda t: t.update({k: t[k].bfloat16() for k in t if "layers.1.mlp.up_proj" in k})),
        "ModelError",
        ["model.layers.1.mlp.up_proj.weight", "name the dtype to write"],
    ),
    "integers": (
        "llama",
        edit_weights(lambda t: t.update({k: t[k].to(torch.int8) for k in t if "layers.1.mlp.up_proj" in k})),
        "ModelError",
        ["model.layers.1.mlp.up_proj.weight is I8"],
    ),
}


class Foreign:
    """What an index must not be able to do."""

    def __reduce__(self):
        return (print, ("code of an unknown file ran",))


def truncate_a_part(folder: Path) -> None:
    part = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:1000])


def no_part(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


# name: (checkpoint of, model converted as, what is done to the checkpoint, what the message must contain)
CHECKPOINTS: dict[str, tuple[str, str, Callable[[Path], object], list[str]]] = {
    "no index": ("llama", "llama", lambda f: (f / ".metadata").unlink(), ["no checkpoint here"]),
    "an index with code": (
        "llama",
        "llama",
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(Foreign())),
        ["it names builtins.print"],
    ),
    "a truncated part": ("llama", "llama", truncate_a_part, ["cannot be read"]),
    "a part missing": ("llama", "llama", no_part, ["cannot be read", "No such file"]),
    "another model's layers": ("llama", "qwen3moe", lambda f: None, ["is no parameter of the model"]),
    "an output layer too many": (
        "llama",
        "llama, tied",
        lambda f: None,
        ["output_layer.weight", "is no parameter"],
    ),
    "an output layer too few": ("llama, tied", "llama", lambda f: None, ["output_layer.weight is missing"]),
}


@pytest.fixture(scope="module")
def found(variants, converted, tmp_path_factory):
    root = tmp_path_factory.mktemp("refused")
    folders, checkpoints = {}, {}
    for name, (model, change, _, _) in FOLDERS.items():
        folders[name] = root / "models" / name
        shutil.copytree(variants / model, folders[name])
        change(folders[name])
    for name, (of, model, break_, _) in CHECKPOINTS.items():
        folder = root / "checkpoints" / name
        shutil.copytree(converted[0] / of / "megatron", folder)
        break_(folder)
        checkpoints[name] = folder, variants / model
    out = root / "out"
    (out / "existing").mkdir(parents=True)
    folders["existing"] = variants / "llama"
    (out / "begun otherwise.partial").mkdir()
    (out / "begun otherwise.partial/order.json").write_text('{"direction": "megatron-to-hf"}')
    folders["begun otherwise"] = variants / "llama"
    results = launch("refusals", module=PROGRAMS, folders=folders, checkpoints=checkpoints, out=out)[0]
    return results, [path.name for path in out.iterdir() if not path.suffix]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_its_model_is_refused_by_tensor(found, name):
    kind, message = found[0][name]
    assert kind == FOLDERS[name][2], message
    for part in FOLDERS[name][3]:
        assert part in message


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_is_not_the_models_is_refused(found, name):
    kind, message = found[0][name]
    assert kind == "CheckpointError", message
    for part in CHECKPOINTS[name][3]:
        assert part in message


def test_an_existing_folder_is_left_alone(found):
    kind, message = found[0]["existing"]
    assert kind == "ConfigError" and "exists; name a folder that does not" in message


def test_work_begun_with_other_words_is_not_continued(found):
    kind, message = found[0]["begun otherwise"]
    assert kind == "ConfigError" and "was begun by another conversion (direction, files" in message


def test_nothing_that_was_refused_is_published(found):
    assert found[1] == ["existing"]


def test_padding_of_the_vocabulary_is_removed(variants, converted, tmp_path):
    """A checkpoint of a model with 520 rows, of which 512 are the model's."""
    wide = tmp_path / "wide"
    shutil.copytree(variants / "llama", wide)
    rows = torch.zeros(8, 64)
    edit_weights(
        lambda t: t.update(
            {k: torch.cat([t[k], rows]) for k in ("lm_head.weight", "model.embed_tokens.weight")}
        )
    )(wide)
    edit_config(vocab_size=520)(wide)
    launch("to_megatron", module=PROGRAMS, model=wide, out=tmp_path / "megatron")
    cases = {"narrow": (tmp_path / "megatron", variants / "llama", tmp_path / "narrow")}
    manifest = launch("to_hf", module=PROGRAMS, cases=cases)[0]["narrow"]
    assert manifest["padding_rows_removed"] == {
        "embedding.word_embeddings.weight": 8,
        "output_layer.weight": 8,
    }
    expected = load_file(variants / "llama/model.safetensors")
    found = {k: v for f in (tmp_path / "narrow").glob("*.safetensors") for k, v in load_file(f).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
