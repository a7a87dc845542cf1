"""What a comparison works on: the images, the network and the recipe that its settings name.

The recipe, fixed before any arm was compared, from the plain network's training alone:
- SGD with momentum 0.9 and weight decay 1e-4 on every parameter is the paper's. Half a cosine to zero
  replaces its steps, which are made for 90 epochs; it needs no epochs to be chosen.
- Learning rate 0.05, which a short run of a few hundred steps bears without a warm-up. After the fork the
  same again, a warm restart (arXiv 1608.03983): attention, which is new, then sees the rates that the
  network saw. Weights from a file are trained on at a tenth of it, as is usual for fine-tuning.
- The digits: batch 32 and 8 epochs twice, so that three seeds stay below four minutes on two CPU cores. The
  plain network comes down from 90 % (chance) to about 12 % error, which leaves room on both sides.
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
from cbam.train.material import misfit_of, network_at, weights_at

DIGITS, FOLDER = {"epochs": 8, "batch_size": 32}, {"epochs": 10, "batch_size": 64}
LR, FINE_TUNING_LR = 0.05, 0.005
MEMORY = 256 << 20  # bytes of validation images that are kept


@dataclass(frozen=True)
class Task:
    """Pictures, the name of the network, and the recipe of every training."""

    train: Images
    val: Images
    network: str
    recipe: Recipe

    @classmethod
    def of(cls, settings: Settings) -> "Task":
        """What `settings` name, with the defaults that go with the data filled in."""
        data, usual = settings.data, FOLDER if settings.data else DIGITS
        train, val = image_folder(data, size=settings.size) if data else cluttered_digits()
        if settings.limit:
            train, val = (images.subset(min(settings.limit, len(images))) for images in (train, val))
        recipe = Recipe(
            epochs=settings.epochs or usual["epochs"],
            batch_size=settings.batch_size or usual["batch_size"],
            lr=settings.lr or (FINE_TUNING_LR if settings.pretrained else LR),
        )
        network = settings.model or _begun(settings) or ("resnet18" if data else "resnet_tiny")
        return cls(train, _Remembered(val), network, recipe)

    def plain(self, seed: int, pretrained: str | None = None) -> nn.Module:
        """The plain network, initialised by `seed`, with the weights of the file if there is one."""
        with seeded(seed):
            model = build(self.network, num_classes=len(self.train.classes))
        if pretrained:
            load(model, pretrained)
        return model


def refine(model: nn.Module, attention: str, seed: int, start: str) -> nn.Module:
    """Attach the attention of that name in place; what is random in it is `seed`'s."""
    with seeded(seed):
        return attach(model, attention=ATTENTION[attention], start=start)


def _begun(settings: Settings) -> str:
    """The network of the run or folder that a comparison begins with; "" where none says it.

    Raises:
        ConfigError: it has attention already.
    """
    name = network_at(settings.pretrained) if settings.pretrained else ""
    if "+" in name:
        raise ConfigError(
            f"{settings.pretrained} is of {name}, and a comparison begins with a plain network: train one by "
            f"`cbam train ... --model {name.partition('+')[0]}`"
        )
    return name


def load(model: nn.Module, path: str) -> Loaded:
    """Load the weights of a file, run or folder; if only the last layer is of other classes, without it."""
    source = weights_at(path)
    try:
        return load_weights(model, source)
    except CheckpointNotFoundError:
        raise
    except CheckpointError as misfit:
        try:
            return load_weights(model, source, head="skip")
        except CheckpointError:
            raise misfit_of(path, misfit) from None


class _Remembered(Images):
    """A validation set that keeps its images once they have been read, as far as MEMORY reaches."""

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
        self._kept: dict[int, tuple[Tensor, Sequence[float]]] = {}
        self._room = MEMORY // (3 * images.size**2)

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        if index in self._kept:
            return self._kept[index]
        sample = self._images.sample(0, index)
        if len(self._kept) < self._room:
            self._kept[index] = sample
        return sample
