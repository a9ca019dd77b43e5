"""Vision towers, as transformers and timm have them, and the projectors that lead to a decoder."""

from vlm_serve.encoders.torchvision_ops import declare_torchvision_ops

# Here, because it must come before timm or transformers is imported by any module of the package.
declare_torchvision_ops()
