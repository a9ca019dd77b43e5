"""Linear layers in the form that their device computes fastest in."""

from vlm_serve.kernels.linear.packed import OneDnnLinear, PackedLinear, PanelLinear, PlainLinear

__all__ = ["OneDnnLinear", "PackedLinear", "PanelLinear", "PlainLinear"]
