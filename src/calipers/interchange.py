"""How do models and data come in from files? Python files, exported programs, state dicts; arrays and folders of images."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calipers import data
from calipers.errors import BadInput, BadModel
from calipers.problem.classifier import Classifier

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def load_model(source: str, *, builder: str | None = None, mean: list[float] | None = None, std: list[float] | None = None) -> Classifier:
    """Return the classifier that `source` names, in evaluation mode as its author left it.

    `file.py:function` (called without arguments, returns a module or a Classifier), `model.pt2` (from torch.export.save), `weights.pt`, `.pth` or
    `.safetensors` (a state dict, with `builder` naming the `file.py:function` that makes the module), or the name of an embedded network. Only
    `file.py` executes code; pickled objects are refused.
    """
    made = _load(source, builder)
    if isinstance(made, Classifier):
        if mean is not None or std is not None:
            raise BadInput(f"{source} returns a Classifier, which holds its own mean and std: leave --mean and --std out")
        return made
    if not isinstance(made, nn.Module):
        raise BadModel(f"{source} gave {type(made).__name__}, not a torch.nn.Module. Let the function return the module itself.")
    return Classifier(made, mean, std)


def _load(source: str, builder: str | None) -> Any:
    if source in data.NAMES:
        return data.build(source)
    if ".py:" in source:
        return _call(source)
    path = _existing(source, "a model")
    if path.suffix == ".pt2":
        return _exported(path)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        if builder is None:
            raise BadInput(f"{source} holds weights only: name the code that builds the module, --builder file.py:function")
        return _with_weights(_call(builder), path)
    raise BadInput(
        f"{source} is no model that can be read. Give file.py:function, a .pt2, weights (.pt, .pth, .safetensors) with --builder, "
        f"or one of {', '.join(data.NAMES)}."
    )


def _existing(source: str, what: str) -> Path:
    path = Path(source)
    if not path.exists():
        raise BadInput(f"there is no file {source} to read {what} from (looked in {Path.cwd().name or '/'}/). Check the path.")
    return path


def _call(source: str) -> Any:
    """Import `file.py`, with its folder importable as it would be for `python file.py`, and call the function."""
    file, _, name = source.rpartition(":")
    path = _existing(file, "a model").resolve()
    spec = importlib.util.spec_from_file_location(f"calipers_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{file} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    if not callable(getattr(module, name, None)):
        found = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        raise BadInput(f"{file} defines no function {name!r}; it defines {', '.join(found) or 'none'}")
    return getattr(module, name)()


def _exported(path: Path) -> nn.Module:
    try:
        module: nn.Module = torch.export.load(path).module()
    except Exception as error:
        raise BadInput(
            f"{path} cannot be read as an exported program ({type(error).__name__}: {error}). Write it with torch.export.save(program, path)."
        ) from error
    return module


def _with_weights(module: Any, path: Path) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise BadModel(f"the builder gave {type(module).__name__}, not a torch.nn.Module")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise BadInput(
            f"{path} cannot be read as plain weights ({type(error).__name__}). Save them with torch.save(module.state_dict(), path) or safetensors."
        ) from error
    try:
        module.load_state_dict(state.get("state_dict", state) if isinstance(state, dict) else state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise BadInput(f"the weights in {path} do not fit the module that the builder makes: {str(error).splitlines()[-1].strip()}") from error
    return module


def load_data(source: str | None, labels: str | None = None, points: int | None = None) -> tuple[Tensor, Tensor]:
    """Return x (N, *D) and y (N,), the first `points` of them.

    `.npz` with arrays x and y (or one of each kind), `.npy` with the labels in another `.npy`, a folder with one sub-folder of images a class (in
    sorted order, as torchvision has it), or None: the embedded MNIST images. 8-bit values are scaled to [0, 1]; images come out as (N, C, H, W).
    """
    if source is None:
        x, y = data.images()
    else:
        path = _existing(source, "data")
        x, y = _folder(path) if path.is_dir() else _arrays(path, labels)
    if len(x) != len(y):
        raise BadInput(f"{source} holds {len(x)} points but {len(y)} labels")
    if points is not None and points < 1:
        raise BadInput(f"the number of points must be at least 1, got {points}")
    return x[:points], y[:points]


def _arrays(path: Path, labels: str | None) -> tuple[Tensor, Tensor]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if labels is None:
                raise BadInput(f"{path} holds the points alone: name the file of their labels, --labels labels.npy")
            return _as_points(loaded), torch.as_tensor(np.load(_existing(labels, "labels"), allow_pickle=False))
        arrays = {k: loaded[k] for k in loaded.files}
    except (ValueError, OSError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} cannot be read as arrays ({error}). Give an .npz with x and y, or an .npy of plain numbers.") from error
    y = next((arrays[k] for k in ("y", "labels", "label", "targets") if k in arrays), None)
    x = next((arrays[k] for k in ("x", "images", "data", "inputs") if k in arrays), None)
    if x is None or y is None:
        raise BadInput(f"{path} holds the arrays {', '.join(arrays) or 'none'}; x (the points) and y (the labels) are needed")
    return _as_points(x), torch.as_tensor(y)


def _as_points(array: np.ndarray[Any, Any]) -> Tensor:
    x = torch.as_tensor(array)
    if x.dtype != torch.uint8:
        return x if x.is_floating_point() else x.double()
    if x.dim() == 3:
        x = x[:, None]
    elif x.dim() == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        x = x.permute(0, 3, 1, 2).contiguous()
    return x.float() / 255


def _folder(path: Path) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInput("reading images needs Pillow: pip install 'calipers[images]'") from error
    classes = sorted(p for p in path.iterdir() if p.is_dir())
    files = [(f, k) for k, folder in enumerate(classes) for f in sorted(folder.rglob("*")) if f.suffix.lower() in _IMAGES]
    if not files:
        raise BadInput(f"{path} holds no images in class folders; expected {path}/CLASS/IMAGE.png")
    arrays = [np.asarray(image) for image in map(Image.open, (f for f, _ in files))]
    sizes = {a.shape for a in arrays}
    if len(sizes) > 1 or any(a.dtype != np.uint8 for a in arrays):
        raise BadInput(
            f"the images in {path} must be 8-bit and of one size, found {len(sizes)} sizes: {', '.join(map(str, sorted(sizes)[:3]))}. Resize them first."
        )
    return _as_points(np.stack(arrays)), torch.tensor([k for _, k in files])
