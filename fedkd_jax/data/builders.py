"""tensorflow-datasets builders of the project's own, which need no TensorFlow: neither to prepare nor to read.

`Tensor` features rather than `Image`, because encoding an array as `Image` needs TensorFlow; `disable_shuffling`, so
that example i of the prepared set is example i of the source. Importing this module imports tensorflow-datasets (0.3 s)
and registers the builders; `sources.load` does so on first use.
"""

import gzip
import math
import pathlib
import zlib

import numpy as np
import tensorflow_datasets as tfds

IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
MOST_BYTES = 2**28  # of an idx file, unpacked


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's digits: 1,797 images 8x8 of ten classes, integers 0..16, in one split. Nothing is downloaded.

    >>> Digits.name
    'digits'
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return _image_info(self, (8, 8, 1), [str(i) for i in range(10)], "scikit-learn's handwritten digits.")

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        import sklearn.datasets  # 0.6 s, needed once in the life of a cache

        pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
        images = pixels.astype(np.uint8).reshape(-1, 8, 8, 1)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}


class LocalFashionMnist(tfds.core.GeneratorBasedBuilder):
    """Fashion-MNIST from the four original idx files in `manual_dir`: 60,000 and 10,000 images 28x28 of ten classes.

    >>> LocalFashionMnist.name
    'local_fashion_mnist'
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the four *-ubyte.gz files of Fashion-MNIST into manual_dir."
    CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

    def _info(self):
        return _image_info(self, (28, 28, 1), list(self.CLASSES), "Fashion-MNIST from local files.")

    def _split_generators(self, dl_manager):
        folder = pathlib.Path(dl_manager.manual_dir)
        return {split: self._generate_examples(folder / x, folder / y) for split, (x, y) in IDX_FILES.items()}

    def _generate_examples(self, images_path, labels_path):
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or not len(labels) or labels.max() > 9:
            raise ValueError(
                f"{images_path} has shape {images.shape} and {labels_path} {labels.shape}; allowed: images [n, 28, 28] and "
                "labels [n] of 0 to 9"
            )
        for i, (image, label) in enumerate(zip(images[..., None], labels, strict=True)):
            yield i, {"image": image, "label": int(label)}


def read_idx(path: pathlib.Path) -> np.ndarray:
    """A gzipped idx file of bytes as a read-only uint8 array.

    The format: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as a big-endian int32,
    data.

    Raises:
      ValueError: the file is no gzip, cut short or too long, or not an idx file of bytes, or of more than `MOST_BYTES`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "a.gz")
    ...     _ = path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 5, 6, 7])))
    ...     read_idx(path)
    array([5, 6, 7], dtype=uint8)
    """
    try:
        with gzip.open(path) as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08":
                raise ValueError(f"its first bytes are {start!r}, not those of an idx file of uint8")
            shape = np.frombuffer(file.read(4 * start[3]), ">i4", count=start[3]).tolist()
            size = math.prod(shape)
            if min(shape, default=-1) < 0 or size > MOST_BYTES:
                raise ValueError(f"its shape is {shape}; allowed: 0 to {MOST_BYTES} bytes in all")
            data = file.read(size + 1)  # no more: a small file may unpack to a huge one
        if len(data) != size:
            raise ValueError(f"it has {'more' if len(data) > size else len(data)} bytes for the shape {shape}")
        return np.frombuffer(data, np.uint8).reshape(shape)
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is damaged, copy it again: {error}") from error


def _image_info(builder, shape, names, description):
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict(
            {"image": tfds.features.Tensor(shape=shape, dtype=np.uint8), "label": tfds.features.ClassLabel(names=names)}
        ),
        supervised_keys=("image", "label"),
        disable_shuffling=True,
    )
