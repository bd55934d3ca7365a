"""What the commands do once their configuration is checked. These modules import torch, which takes seconds; the commands do not."""
