"""``model=hf``: shapes from config.json without torch, and every kind of bad input in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lab.config import CONFIG_DIR, ConfigError, load
from tests.unit.hf_cases import hf_overrides, write_config

EXAMPLES = sorted((CONFIG_DIR / "hf").glob("*.json"))
PUBLISHED = {  # parameters, as the models' own cards or papers count them
    "llama_1b": 1_235_814_400,
    "llama_7b": 6_738_415_616,
    "llama_8b": 8_030_261_248,
    "mistral_7b": 7_248_023_552,
    "qwen2_0.5b": 494_032_768,
    "qwen2_1.5b": 1_543_714_304,
    "qwen3_0.6b": 596_049_920,
    "gemma_2b": 2_506_172_416,
    "gpt2": 124_439_808,
}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_example_files_have_the_published_number_of_parameters(file: Path) -> None:
    from lab.analytic.architecture import num_parameters

    cfg = load(["hardware=cpu", "model=hf", f"model.path=configs/hf/{file.name}", "model.random_weights=true"])
    assert num_parameters(cfg.model) == PUBLISHED[file.stem]
    assert cfg.model.name == file.stem


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    def read(name: str, **changes: object):  # type: ignore[no-untyped-def]
        return load(hf_overrides(write_config(tmp_path, name, **changes), "hardware=cpu")).model

    assert read("llama").tied_head is False
    assert read("gemma").tied_head is True
    assert read("gemma", head_dim=None).head_dim == 256
    assert read("qwen3", head_dim=None).head_dim == 128
    assert read("llama", num_key_value_heads=None).num_kv_heads == 4
    gpt2 = read("gpt2")
    assert (gpt2.dropout, gpt2.hf.residual_dropout, gpt2.intermediate_size, gpt2.hf.activation) == (
        0.1,
        0.1,
        128,
        "gelu_new",
    )
    assert read("qwen2").bias
    assert not read("qwen2").hf.output_bias
    assert read("mistral", sliding_window=64).hf.sliding_window == 64
    assert read("qwen2", sliding_window=64).hf.sliding_window is None  # use_sliding_window is false


def test_which_layers_slide(tmp_path: Path) -> None:
    """As transformers' configuration classes say, whose own reading is compared where there is one."""
    from lab.model.hf import hf_config

    def read(name: str, *more: str, **changes: object) -> list[bool]:
        changes = {"num_hidden_layers": 4, **changes}
        cfg = load(hf_overrides(write_config(tmp_path, name, **changes), "hardware=cpu", *more))
        found = [cfg.model.hf.slides(i) for i in range(cfg.model.num_layers)]
        if name != "mistral":
            types = hf_config(cfg.model, cfg.attention.backend).layer_types
            assert found == [t == "sliding_attention" for t in types]
        return found

    on = {"use_sliding_window": True, "sliding_window": 16}
    assert read("mistral", sliding_window=16) == [True] * 4
    assert read("qwen2", sliding_window=16) == [False] * 4
    assert read("qwen2", **on) == [False] * 4  # max_window_layers is 28
    assert read("qwen2", **on, max_window_layers=0) == [True] * 4
    assert read("qwen3", **on, max_window_layers=3) == [False, False, False, True]
    assert read("qwen3", "model.num_layers=3", **on, max_window_layers=2) == [False, False, True]
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert read("qwen3", **on, layer_types=types) == [True, False, True, False]
    assert read("qwen3", "model.num_layers=3", **on, layer_types=types) == [True, False, True]
    assert read("qwen3", layer_types=["full_attention"] * 4) == [False] * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["sliding_attention"] * 2}, "needs use_sliding_window=true"),
        ({"layer_types": ["full_attention"], "use_sliding_window": True}, "for each of 2 layers"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "expected full_attention or sliding_attention"),
        ({"sliding_window": 0, "use_sliding_window": True}, "positive whole number"),
        ({"max_window_layers": -1, "use_sliding_window": True}, "positive whole number"),
    ],
)
def test_layers_that_transformers_would_refuse(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load(hf_overrides(write_config(tmp_path, "qwen2", **changes), "hardware=cpu"))


def test_kernels_that_take_no_mask(tmp_path: Path) -> None:
    """Where the window is full: flash never, the memory-efficient one with repeated heads, of the right size."""

    def asked(kernel: str, name: str = "mistral_sliding", *more: str, **changes: object) -> str:
        path = write_config(tmp_path, name, **changes)
        try:
            load(hf_overrides(path, "hardware=h200", f"attention={kernel}", *more))
        except ConfigError as error:
            return str(error)
        return ""

    assert "takes no mask" in asked("flash")
    assert "takes no mask" in asked("flash", "qwen3_sliding")
    assert asked("flash", "mistral_sliding", "train.seq_len=15") == ""
    assert asked("flash", "mistral_sliding", "model.num_layers=1", sliding_window=33) == ""
    assert asked("cudnn") == asked("math") == asked("eager") == asked("auto") == ""
    assert asked("mem_efficient") == ""  # every layer repeats its heads
    assert "which refuses that" in asked("mem_efficient", "qwen3_sliding")
    assert "which refuses that" in asked("mem_efficient", "mistral_sliding", "train.seq_len=15")
    assert "a multiple of 8" in asked("mem_efficient", head_dim=12)
    assert asked("mem_efficient", "mistral_sliding", "precision=fp32", head_dim=12) == ""
    load(hf_overrides(write_config(tmp_path, "mistral_sliding"), "hardware=cpu", "attention=flash"))


def test_fewer_layers_than_the_file_says(tmp_path: Path) -> None:
    path = write_config(tmp_path, "llama")
    assert load(hf_overrides(path, "hardware=cpu", "model.num_layers=1")).model.num_layers == 1


def test_a_config_is_read_without_torch_or_transformers(tmp_path: Path) -> None:
    overrides = hf_overrides(write_config(tmp_path, "llama"), "hardware=h200")
    code = (
        "import sys; from lab.config import load; from lab.analytic import predict;"
        f"predict(load({overrides!r}));"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'hydra') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(["hardware=cpu", "model=hf", *overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folder_with(tmp_path: Path, **files: bytes) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_config(tmp_path, "llama").rename(folder / "config.json")
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def test_no_path_and_wrong_paths(tmp_path: Path) -> None:
    assert "needed with model=hf" in refused()
    assert "no such file or folder" in refused("model.path=nowhere")
    assert "no config.json" in refused(f"model.path={tmp_path}")
    (tmp_path / "model.bin").write_bytes(b"")
    assert "expected a folder, a hub id or a config.json" in refused(f"model.path={tmp_path}/model.bin")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[1]", "not a JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": "llama"}', "no hidden_size"),
        ('{"model_type": "mystery"}', "which the lab does not know"),
    ],
)
def test_corrupt_config_json(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert said in refused(f"model.path={path}", "model.random_weights=true")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": -1}, "hidden_size=-1"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers='two'"),
        ({"num_key_value_heads": 3}, "must divide num_attention_heads=4"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"attention_dropout": 1.5}, "dropout=1.5"),
    ],
)
def test_values_that_make_no_model(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, "llama", **changes)
    assert said in refused(f"model.path={path}", "model.random_weights=true", "data.tokenizer_vocab_size=512")


def test_missing_corrupt_and_pickled_weights(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    path = (f"model.path={folder}", "data.tokenizer_vocab_size=512", "train.seq_len=32")
    assert "no *.safetensors there" in refused(*path)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert "can run any code" in refused(*path)
    load(["hardware=cpu", "model=hf", *path, "model.allow_pickle=true"])
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    assert "corrupt or cut off" in refused(*path)
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12345678")
    assert "bytes, not the" in refused(*path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert "gone.safetensors, which is missing" in refused(*path)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "index.json is corrupt" in refused(*path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["loss=chunked"], "the model's own loss"),
        (["checkpointing=selective"], "whole blocks"),
        (["hardware=h200", "attention=mem_efficient"], "which refuses that"),
        (["train.seq_len=129"], "at most model.max_seq_len=128"),
        (["model.hidden_size=64"], "not a setting of model=hf"),
    ],
)
def test_settings_that_a_hugging_face_model_cannot_have(more: list[str], said: str, tmp_path: Path) -> None:
    hardware = [] if any(o.startswith("hardware") for o in more) else ["hardware=cpu"]
    with pytest.raises(ConfigError, match=said):
        load(hf_overrides(write_config(tmp_path, "llama"), *hardware, *more))


def test_fewer_layers_need_random_weights(tmp_path: Path) -> None:
    assert "unless model.random_weights=true" in refused(
        f"model.path={write_config(tmp_path, 'llama')}", "model.num_layers=1"
    )
