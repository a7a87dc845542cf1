"""What a comparison works on: the images, the network and the recipe given by its settings.

The recipe was fixed before any arms were compared, using only the training of the plain network:
- SGD with momentum 0.9 and weight decay 1e-4 on every parameter, as in the paper. Half a cosine to zero
  replaces its steps, which are made for 90 epochs; a cosine has no step epochs to choose.
- Learning rate 0.05, at which a short run of a few hundred steps is stable without a warm-up. The fork
  repeats it, a warm restart (arXiv 1608.03983), so that the new attention sees the same rates as the
  network did. Weights from a file are trained further at a tenth of it, as is usual for fine-tuning.
- The digits: batch 32 and 8 epochs twice, so that three seeds take less than four minutes on two CPU cores.
  The error of the plain network falls from 90 % (chance) to about 12 %, which leaves room on both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cbam.data import Images, cluttered_digits, image_folder
from cbam.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cbam.models import build
from cbam.nn import ATTENTION
from cbam.studies.settings import Settings
from cbam.surgery import attach, load_weights
from cbam.surgery.effects import seeded
from cbam.surgery.weights import Loaded
from cbam.train import Recipe
from cbam.train.material import network_name, weights_from, with_path

DIGITS, FOLDER = {"epochs": 8, "batch_size": 32}, {"epochs": 10, "batch_size": 64}
LR, FINE_TUNING_LR = 0.05, 0.005
MEMORY = 256 << 20  # bytes of validation images kept in memory


@dataclass(frozen=True)
class Task:
    """The images, the name of the network, and the recipe of every training."""

    train: Images
    val: Images
    network: str
    recipe: Recipe

    @classmethod
    def of(cls, settings: Settings) -> "Task":
        """The task given by `settings`, with the defaults for the data filled in."""
        data, usual = settings.data, FOLDER if settings.data else DIGITS
        train, val = image_folder(data, size=settings.size) if data else cluttered_digits()
        if settings.limit:
            train, val = (images.subset(min(settings.limit, len(images))) for images in (train, val))
        recipe = Recipe(
            epochs=settings.epochs or usual["epochs"],
            batch_size=settings.batch_size or usual["batch_size"],
            lr=settings.lr or (FINE_TUNING_LR if settings.pretrained else LR),
        )
        network = settings.model or _recorded_network(settings) or ("resnet18" if data else "resnet_tiny")
        return cls(train, _Cached(val), network, recipe)

    def plain(self, seed: int, pretrained: str | None = None) -> nn.Module:
        """The plain network, initialised from `seed`, with the weights of `pretrained` if given."""
        with seeded(seed):
            model = build(self.network, num_classes=len(self.train.classes))
        if pretrained:
            load(model, pretrained)
        return model


def refine(model: nn.Module, attention: str, seed: int, start: str) -> nn.Module:
    """Attach the attention of that name in place, initialised from `seed`."""
    with seeded(seed):
        return attach(model, attention=ATTENTION[attention], start=start)


def _recorded_network(settings: Settings) -> str:
    """The network of the run or folder of pretrained weights; "" if it is not recorded.

    Raises:
        ConfigError: it already has attention.
    """
    name = network_name(settings.pretrained) if settings.pretrained else ""
    if "+" in name:
        raise ConfigError(
            f"{settings.pretrained} is of {name}, but a comparison needs a plain network: train one with "
            f"`cbam train ... --model {name.partition('+')[0]}`"
        )
    return name


def load(model: nn.Module, path: str) -> Loaded:
    """Load the weights of a file, run or folder, without the last layer if that is all that differs."""
    source = weights_from(path)
    try:
        return load_weights(model, source)
    except CheckpointNotFoundError:
        raise
    except CheckpointError as misfit:
        try:
            return load_weights(model, source, head="skip")
        except CheckpointError:
            raise with_path(path, misfit) from None


class _Cached(Images):
    """A validation set that caches its images, up to MEMORY bytes."""

    def __init__(self, images: Images) -> None:
        super().__init__(
            images.name,
            images.classes,
            images.targets,
            size=images.size,
            has_boxes=images.has_boxes,
            mean=images.mean,
            std=images.std,
            notes=images.notes,
        )
        self._images = images
        self._cache: dict[int, tuple[Tensor, Sequence[float]]] = {}
        self._room = MEMORY // (3 * images.size**2)

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        if index in self._cache:
            return self._cache[index]
        sample = self._images.sample(0, index)
        if len(self._cache) < self._room:
            self._cache[index] = sample
        return sample
