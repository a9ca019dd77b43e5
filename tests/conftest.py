"""What every test stands on: torchvision importable before peft or transformers ask for it."""

import vlm_serve.encoders  # noqa: F401
