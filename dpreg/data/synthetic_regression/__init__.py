"""The synthetic data of D2L section 3.3 as a TFDS dataset. A folder of its own, as TFDS reads metadata from it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dpreg.data.sources import Source
from dpreg.data.synthetic import SyntheticRegressionData

_WRITE_ROWS = 4096


class SyntheticRegression(tfds.core.GeneratorBasedBuilder):
    """The rows of `dpreg.SyntheticRegressionData`, prepared on disk: "x" [d] and "y" [t] float32.

    Args:
      data: the rows; those of D2L section 3.4 by default. Any other belongs into a `data_dir` of its own.
      **builder: as for any TFDS builder, such as `data_dir`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, data: SyntheticRegressionData | None = None, **builder: Any):
        self._data = data or SyntheticRegressionData(w=(2.0, -3.4), b=4.2)
        super().__init__(**builder)

    def _info(self) -> tfds.core.DatasetInfo:
        columns = {"x": self._data.num_inputs, "y": self._data.num_targets}
        return self.dataset_info_from_configs(
            description="y = x w + b + noise with known w and b.",
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Tensor(shape=(size,), dtype=np.float32) for name, size in columns.items()}
            ),
            supervised_keys=("x", "y"),
            disable_shuffling=True,  # the key is the row's index
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, np.ndarray]]]]:
        del dl_manager  # nothing is downloaded
        splits = {"train": self._data.train, "validation": self._data.val}
        return {name: self._generate_examples(source) for name, source in splits.items() if source}

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for start in range(0, len(source), _WRITE_ROWS):
            rows = source[np.arange(start, min(start + _WRITE_ROWS, len(source)))]
            for i, (x, y) in enumerate(zip(rows["x"], rows["y"], strict=True), start):
                yield i, {"x": x, "y": y}
