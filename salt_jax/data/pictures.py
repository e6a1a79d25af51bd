import numpy as np
from PIL import Image

from salt_jax.errors import UserError


def read_picture(path):
    try:
        with Image.open(path) as file:
            return np.asarray(file.convert("RGB"))
    except OSError as error:
        raise UserError(f"cannot read the picture {path} ({error}); check --image") from error
