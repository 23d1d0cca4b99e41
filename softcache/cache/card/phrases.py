"""What codecs, steps of views and outputs are called on the card."""

from __future__ import annotations

CODECS = {
    "float32": "every logit as a 32-bit float, exactly as the teacher gave it",
    "float16": "every logit as a 16-bit float",
    "int8": "every logit in 8 bits, with a scale per record",
    "headtail": "the largest logits in 16 bits, all others in few bits with a scale per record",
    "lowrank": "coordinates in a basis over classes; records that this would not hold well enough are kept in 16 bits",
    "topk": "the largest logits only, and how much probability all other classes have together",
    "topset": "the largest logits only, in a byte each, and how much probability all other classes have together",
    "linear_head": "the input of the teacher's final linear layer, and that layer once",
}


STEPS = {
    "to_rgb": "three colour channels",
    "resize": "resized",
    "center_crop": "cut to the middle",
    "middle_crop": "cut to the middle and resized",
    "shift": "shifted at random",
    "crop_flip": "padded, cropped and mirrored at random",
    "resized_crop_flip": "a random part of the image, resized and mirrored at random",
    "rotate": "rotated at random",
    "color_jitter": "brightness, contrast, saturation and hue changed at random",
    "randaugment": "random operations on colours and shape",
    "erase": "a random box erased",
    "seeded": "a transform of the maker's own",
    "mixup": "blended with another sample",
    "cutmix": "a box of another sample pasted in",
}


POSITIONS = {  # kind of an index -> what one position is, and several
    "tokens": ("token", "tokens"),
    "words": ("word", "words"),
    "grid": ("cell", "cells"),
    "frames": ("frame", "frames"),
    "candidates": ("candidate", "candidates"),
}
OUTPUTS = {
    "logits": "logits",
    "log_probs": "log-probabilities",
    "probs": "probabilities (stored as logarithms)",
    "embedding": "an embedding",
    "values": "named numbers",
    None: "features alone",
}
