"""Models, data and properties from files and from other libraries.

Python, ONNX and VNN-LIB files, exported programs, state dicts; arrays and folders of images.
"""

from calipers.interchange.arrays import load_data
from calipers.interchange.lists import load_instances
from calipers.interchange.models import load
from calipers.interchange.onnx_files import load_onnx
from calipers.interchange.vnnlib import load_vnnlib

__all__ = ["load", "load_data", "load_instances", "load_onnx", "load_vnnlib"]
